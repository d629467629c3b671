"""The cells of an evaluation, shots x draws x freeze depths x probes: trained together where possible, and scored."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raylab.base.identity import digest
from raylab.base.noise import derive_seed
from raylab.base.world import ALONE, World
from raylab.evaluation.activations import Texts
from raylab.evaluation.draws import Draw
from raylab.evaluation.finetune import STATE, Tuning, count_tokens
from raylab.evaluation.heads import Floats, Run, Trained, train_heads
from raylab.evaluation.probes import LOGISTIC_C, Fit, Rows, fit_probe, list_steps, list_strengths, train_logistic
from raylab.job.blocks import FineTune
from raylab.job.specs import TrialSpec
from raylab.measures.scores import list_confusions, list_scores
from raylab.store.stages import FOLDER, Stage, build_stage, name_stage, prune_stage, read_info
from raylab.training.encoder import choose_device, copy_above, is_half

Ints = NDArray[np.int64]
# Fine-tuned cells of so many steps are kept: shorter ones are done again sooner than found.
KEPT_STEPS = 50
# A longer cell is kept on the way, every so many steps.
PART_STEPS = 1000
# A cell is trained by all workers of its trial where each has at least so many tokens of a batch. On CPU two workers
# then need 15 to 40 % less each, whatever the encoder's size; at half of that the gain is gone, before any waiting for
# gradients. A GPU is no quicker with less than a few thousand tokens: the number for it is an estimate.
SHARED_TOKENS = {"cpu": 256, "cuda": 2048}


class Inputs(NamedTuple):
    """What classifiers see of some rows, by place in one list: rows int64 [n], rising, is where each comes from.

    Embeddings x [n, D], and `texts(depth)`: what enters the layers above a freeze depth. Where `encoder`, the id of the
    encoder's stage, is given, fine-tuned cells are kept; `tokens` is the id of the rows' tokens. The other workers of
    `world` train large cells with this one, as it tells them to.
    """

    rows: Ints
    x: NDArray[np.float32]
    texts: Callable[[str], Texts]
    tokens: str
    encoder: str | None
    world: World = ALONE

    def find(self, rows: Ints) -> Ints:
        """The places of some rows."""
        return np.searchsorted(self.rows, rows)


class Part(NamedTuple):
    """What rank 0 tells the other workers to train with it: a run, to step `until`, at a freeze depth of its encoder.

    `tokens` and `rows` as in `Inputs`; probabilities are asked for at `steps`; `before` is the id of the stage with the
    part that it goes on from.
    """

    tokens: str
    rows: Ints
    depth: str
    run: Run
    outputs: int
    steps: list[int]
    before: str | None
    until: int


def score_draws(
    spec: TrialSpec,
    model: Callable[[], nn.Module],
    task: str,
    draws: list[Draw],
    labels: NDArray[Any],
    groups: Ints,
    inputs: Inputs,
    judges: Rows,
    wanted: Rows,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of scores and of confusions for every shots, draw, freeze depth and probe, on the `wanted` rows.

    labels and groups are those of the task's table, which draws index; `judges` the validation rows, looked at where
    `evaluate.selection` says so.
    """
    evaluate, root = spec.settings.evaluate, Path(spec.results) / FOLDER
    classes = read_info(root / spec.corpus)["classes"][task]
    outputs = len(classes)
    if labels.ndim == 1:  # a row without a label can't be scored
        judges, wanted = (Rows(of.rows[of.labels >= 0], of.labels[of.labels >= 0]) for of in (judges, wanted))
    cells: dict[tuple[str, str], list[Trained]] = {}
    for depth in evaluate.frozen_layers:
        probes: tuple[str, ...] = evaluate.probes if depth == "all" else ("mlp",)
        for probe in probes:
            fits = [
                Fit(
                    inputs.find(draw.rows), labels[draw.rows], groups[draw.rows],
                    derive_seed(spec.seed, "probe", task, probe, depth, str(draw.shots), draw.draw),
                )
                for draw in draws
            ]  # fmt: skip
            steps = evaluate.fine_tune.steps
            tried: list[float] = list_strengths(evaluate.selection)
            default = tried.index(LOGISTIC_C)
            if probe == "mlp":
                tried = [*list_steps(steps, evaluate.selection)]
                default = tried.index(steps)
            train = _trainer(spec, model, depth, probe, tried, outputs, inputs)
            # Draws of as many shots together: to the last bit, the numbers of some are the same whatever other shots
            # are asked for beside them.
            cells[depth, probe] = [
                trained
                for _, places in itertools.groupby(range(len(draws)), lambda place: draws[place].shots)
                for trained in fit_probe(
                    train, [fits[place] for place in places], wanted.rows,
                    candidates=len(tried), default=default, selection=evaluate.selection, judges=judges,
                )
            ]  # fmt: skip
    scores: list[dict[str, Any]] = []
    confusions: list[dict[str, Any]] = []
    for index, draw in enumerate(draws):
        for (depth, probe), trained in cells.items():
            probabilities = trained[index].probabilities[0]
            cell = {"shots": draw.shots, "frozen_layers": depth, "probe": probe, "draw": draw.draw}
            beside = {
                "num_train": len(draw.rows),
                "num_eval": len(wanted.rows),
                "selection": evaluate.selection,
                "parameters_updated": trained[index].num_parameters,
                "train_seconds": trained[index].seconds,
            }
            scores += [cell | row | beside for row in list_scores(wanted.labels, probabilities, classes)]
            confusions += [cell | row for row in list_confusions(wanted.labels, probabilities, classes)]
    return scores, confusions


def _trainer(
    spec: TrialSpec,
    model: Callable[[], nn.Module],
    depth: str,
    probe: str,
    tried: Sequence[float],
    outputs: int,
    inputs: Inputs,
) -> Callable[[list[Run]], list[Trained]]:
    """What trains the runs of a probe at a freeze depth, at each of the candidates `tried`."""
    settings, steps = spec.settings.evaluate.fine_tune, [int(step) for step in tried]
    if depth == "all":
        x = torch.from_numpy(np.array(inputs.x)).to(choose_device())
        if probe == "logistic":
            return lambda runs: train_logistic(x, runs, tried, outputs, settings.class_weights)
        return lambda runs: train_heads(x, runs, steps, outputs, settings)

    @functools.cache
    def open_above() -> tuple[nn.Module, Texts]:
        return copy_above(model(), depth), inputs.texts(depth)

    def train_one(run: Run) -> Trained:
        def go_on(before: Stage | None, until: int) -> Tuning:
            above, texts = open_above()
            half = is_half(spec.settings.evaluate.precision, above)
            tuning = Tuning(above, texts, run, outputs, settings, half)
            if before is not None:
                tuning.load(before.path)
            world = inputs.world if is_large(texts, run, settings, inputs.world) else ALONE
            # Nothing but the training stands between this and its end: an error there ends this process.
            before_id = None if before is None else before.stage_id
            world.broadcast(Part(inputs.tokens, inputs.rows, depth, run, outputs, steps, before_id, until))
            tuning.train(until, steps, world)
            return tuning

        if inputs.encoder is not None and steps[run.until] >= KEPT_STEPS:
            return keep_cell(spec, depth, run, steps, outputs, inputs, go_on)
        return go_on(None, steps[run.until]).finish()

    return lambda runs: [train_one(run) for run in runs]


def is_large(texts: Texts, run: Run, settings: FineTune, world: World) -> bool:
    """Whether a run is trained by all of a trial's workers."""
    batch = min(settings.batch_size, len(run.train)) * float(count_tokens(texts)[run.train].mean())
    return world.size > 1 and batch >= SHARED_TOKENS[choose_device().type] * world.size


def keep_cell(
    spec: TrialSpec,
    depth: str,
    run: Run,
    steps: list[int],
    outputs: int,
    inputs: Inputs,
    go_on: Callable[[Stage | None, int], Tuning],
) -> Trained:
    """A fine-tuned cell as a stage of its own: an evaluation that is interrupted, or asks for more, goes on from it.

    A long one is a chain of stages, with its weights and optimiser after every `PART_STEPS`, until its end is there;
    `go_on` trains from such a stage, or from the beginning, to a step.
    """
    results, corpus = Path(spec.results), spec.settings.corpus
    key = {
        "encoder": inputs.encoder,
        "tokens": inputs.tokens,
        "depth": depth,
        "precision": spec.settings.evaluate.precision,
        "train": digest([inputs.rows[run.train].tolist(), run.labels.tolist()]),
        "eval": digest(inputs.rows[run.eval].tolist()),
        "outputs": outputs,
        "steps": steps[: run.until + 1],
        "fine_tune": spec.settings.evaluate.fine_tune.model_dump(mode="json", exclude={"steps"}),
        "max_length": corpus.max_length,
        "long_documents": corpus.long_documents,
        "seed": run.seed,
    }
    last = steps[run.until]
    ends = [*range(PART_STEPS, last, PART_STEPS), last]

    def reach(part: int) -> Stage:
        def build(folder: Path) -> dict[str, Any]:
            tuning = go_on(reach(part - 1) if part else None, ends[part])
            if ends[part] < last:
                tuning.save(folder)
                return {}
            trained = tuning.finish()
            np.save(folder / "probabilities.npy", np.stack(trained.probabilities))
            return {"num_parameters": trained.num_parameters, "seconds": trained.seconds}

        return build_stage(
            results, "cell", {**key, "until": ends[part]}, build, needs=STATE if ends[part] < last else None
        )

    stage = reach(len(ends) - 1)
    for end in ends[:-1]:
        prune_stage(results, name_stage("cell", {**key, "until": end}), ("",))
    found: list[Floats] = list(np.load(stage.path / "probabilities.npy"))
    return Trained(found, stage.info["num_parameters"], stage.info["seconds"])
