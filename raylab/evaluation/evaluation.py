"""Evaluation of an encoder: embeddings, few-shot scores and geometry, on validation or, once unsealed, on test."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from raylab.base.identity import digest
from raylab.base.mistakes import InfeasibleError, JobError
from raylab.base.noise import derive_seed
from raylab.base.world import ALONE, World
from raylab.data.corpus import VALIDATION, open_rows
from raylab.data.tokens import TokenStore, Vocabulary, open_tokens
from raylab.evaluation.activations import KEPT_BYTES, Texts, keep_states, open_states, open_texts, prune_states
from raylab.evaluation.cells import Inputs, Part, score_draws
from raylab.evaluation.draws import list_draws
from raylab.evaluation.finetune import STATE, Tuning
from raylab.evaluation.probes import Rows
from raylab.job.settings import list_boundaries
from raylab.job.specs import TrialSpec
from raylab.measures.geometry import Options, measure_geometry
from raylab.store.stages import FOLDER, Stage, build_stage, open_stage, read_info
from raylab.training.embedding import embed
from raylab.training.encoder import choose_device, copy_above, is_half, load_encoder, name_precision
from raylab.training.heldout import pair_spans
from raylab.training.rungs import name_start

Ints = NDArray[np.int64]


class Evaluation(NamedTuple):
    """Rows for `scores`, `confusions` and `geometry`, and the stages used."""

    scores: list[dict[str, Any]]
    confusions: list[dict[str, Any]]
    geometry: list[dict[str, Any]]
    stages: list[Stage]


def open_encoder(stage: Stage) -> nn.Module:
    """The encoder of a stage, ready to embed."""
    model, _ = load_encoder(str(stage.path / "encoder"))
    return model.to(choose_device()).eval()


def evaluate_encoder(
    spec: TrialSpec, stage_id: str, rung: int, open_encoder: Callable[[], nn.Module], world: World = ALONE
) -> Evaluation:
    """Scores and geometry of a rung's encoder on the validation rows of every evaluated task.

    `open_encoder` is called only where an evaluation is not there yet: another job may have done it. Rank 0 of a trial
    calls this, the other workers of `world` meanwhile `follow_evaluation`.
    """
    opened: list[nn.Module] = []

    def model() -> nn.Module:
        if not opened:
            opened.append(open_encoder())
        return opened[0]

    result = Evaluation([], [], [], [])
    for task in spec.settings.evaluate.tasks or spec.settings.corpus.tasks:
        result.stages.extend(_evaluate_task(spec, stage_id, task, model, world))
        done = result.stages[-1]
        rows = json.loads((done.path / "rows.json").read_text())
        common = {"rung": rung, "task": task, "split": "validation"}
        result.scores.extend(common | row for row in rows["scores"])
        result.confusions.extend(common | row for row in rows["confusions"])
        result.geometry.extend(common | row for row in rows["geometry"])
    return result


def follow_evaluation(spec: TrialSpec, encoder: str, world: World) -> None:
    """What a worker does while rank 0 evaluates an encoder's stage: its share of every cell that it is told to train.

    Ends when rank 0 broadcasts None. Raises InfeasibleError where it broadcasts an error's text instead: its own ended
    the trial.
    """
    results = Path(spec.results)

    @functools.cache
    def model() -> nn.Module:
        folder = open_stage(results, encoder, "encoder")
        if folder is None:
            raise FileNotFoundError(encoder)
        return open_encoder(Stage("pretrain", encoder, folder, True, 0.0, {}))

    used: dict[str, Stage] = {}
    while (part := world.broadcast(None)) is not None:
        if isinstance(part, str):
            raise InfeasibleError(part)
        try:
            _train_share(spec, model, encoder, part, used, world)
        except (InfeasibleError, JobError) as error:
            # A trial that ends so leaves its process as it is, and rank 0 would wait for this one.
            raise RuntimeError(f"a worker could not follow: {type(error).__name__}") from error
    for states in used.values():
        if states.info["bytes"] > KEPT_BYTES:
            prune_states(results, states.stage_id)  # rank 0 did; this node may have a mirror of its own


def _train_share(
    spec: TrialSpec,
    model: Callable[[], nn.Module],
    encoder: str,
    part: Part,
    used: dict[str, Stage],
    world: World,
) -> None:
    """A worker's share of a part of a cell; the stage of activations that it needs is noted in `used`."""
    root, corpus = Path(spec.results) / FOLDER, spec.settings.corpus
    store, vocabulary = open_tokens(root / part.tokens), Vocabulary(**read_info(root / spec.tokenizer))
    if part.depth == "none":
        texts = open_texts(store, part.rows, vocabulary, corpus)
    else:
        states = state_rows(spec, model, encoder, part.tokens, store, part.rows)
        used[states.stage_id] = states
        texts = open_states(states.path, part.depth)
    above = copy_above(model(), part.depth)
    half = is_half(spec.settings.evaluate.precision, above)
    tuning = Tuning(above, texts, part.run, part.outputs, spec.settings.evaluate.fine_tune, half)
    if part.before is not None:
        before = open_stage(Path(spec.results), part.before, STATE)
        if before is None:
            raise FileNotFoundError(part.before)
        tuning.load(before)
    tuning.train(part.until, part.steps, world)


def _evaluate_task(
    spec: TrialSpec, encoder: str, task: str, model: Callable[[], nn.Module], world: World
) -> list[Stage]:
    """The embeddings, hidden states and, last, evaluation of an encoder's stage on a task, kept by content."""
    evaluate, root = spec.settings.evaluate, Path(spec.results) / FOLDER
    measures = evaluate.model_dump(mode="json", exclude={"tasks", "retrieval"})
    if all(depth == "all" for depth in evaluate.frozen_layers) and "mlp" not in evaluate.probes:
        measures["fine_tune"] = {"class_weights": evaluate.fine_tune.class_weights}
    key = {
        "encoder": encoder,
        "task": task,
        "tokens": spec.tokens[task],
        "rows": read_info(root / spec.corpus)["digests"][f"task:{task}"],
        "max_length": spec.settings.corpus.max_length,
        "long_documents": spec.settings.corpus.long_documents,
        "evaluate": measures,
        "span": evaluate.retrieval.span if evaluate.geometry.spans else None,
        "seed": spec.seed,
    }
    used: dict[str, Stage] = {}
    states: dict[str, Texts] = {}
    weights = name_weights(spec, encoder)

    def open_states_of(store: TokenStore, needed: Ints, depth: str) -> Texts:
        if depth == "none":
            return open_texts(store, needed, Vocabulary(**read_info(root / spec.tokenizer)), spec.settings.corpus)
        if "activations" not in used:
            used["activations"] = state_rows(spec, model, weights, spec.tokens[task], store, needed)
            # All at once: what is mapped stays, also where another job's end prunes the files.
            depths = set(list_boundaries(spec.settings)) & set(evaluate.frozen_layers)
            states.update({depth: open_states(used["activations"].path, depth) for depth in depths})
        return states[depth]

    def open_embeddings(store: TokenStore, needed: Ints) -> NDArray[np.float32]:
        for depth in set(list_boundaries(spec.settings)) & set(evaluate.frozen_layers):
            open_states_of(store, needed, depth)  # their pass gives the embeddings too
        used["embed"] = embed_rows(spec, model, weights, task, store, needed, used.get("activations"))
        x: NDArray[np.float32] = np.load(used["embed"].path / "embeddings.npy", mmap_mode="r")
        return x

    def build(folder: Path) -> dict[str, Any]:
        found = measure_task(spec, task, model, open_embeddings, open_states_of, encoder=encoder, world=world)
        (folder / "rows.json").write_text(json.dumps(found, allow_nan=False))
        ids = {kind: stage.stage_id for kind, stage in used.items()}
        return {"used": ids, "precision": used["embed"].info["precision"]}

    done = build_stage(Path(spec.results), "evaluate", key, build)
    if "activations" in used and used["activations"].info["bytes"] > KEPT_BYTES:
        prune_states(Path(spec.results), used["activations"].stage_id)
    # Found, what it was made of was used none the less.
    for kind, stage_id in done.info["used"].items():
        used.setdefault(kind, Stage(kind, stage_id, root / stage_id, True, 0.0, {}))
    return [*used.values(), done]


def measure_task(
    spec: TrialSpec,
    task: str,
    model: Callable[[], nn.Module],
    open_embeddings: Callable[[TokenStore, Ints], NDArray[np.float32]],
    open_states_of: Callable[[TokenStore, Ints, str], Texts],
    *,
    encoder: str | None = None,
    world: World = ALONE,
) -> dict[str, list[dict[str, Any]]]:
    """Scores, confusions and geometry of an encoder on a task's validation rows, as plain rows.

    `open_embeddings(store, rows)` gives the embeddings [len(rows), D] of some rows of the task, `open_states_of(store,
    rows, depth)` what enters the layers above a freeze depth. Fine-tuned cells are kept under the id of the `encoder`'s
    stage; without one nothing is kept.
    """
    evaluate, root = spec.settings.evaluate, Path(spec.results) / FOLDER
    rows = open_rows(root / spec.corpus, task)
    store = open_tokens(root / spec.tokens[task])
    validation = np.flatnonzero(rows["part"] == VALIDATION)
    draws = list(list_draws(rows, task, evaluate, spec.seed))
    needed = np.unique(np.concatenate([validation, *(draw.rows for draw in draws)]))
    x = open_embeddings(store, needed)
    inputs = Inputs(needed, x, lambda depth: open_states_of(store, needed, depth), spec.tokens[task], encoder, world)
    judges = Rows(inputs.find(validation), rows["label"][validation])
    scores, confusions = score_draws(spec, model, task, draws, rows["label"], rows["group"], inputs, judges, judges)
    measured = measure_geometry(
        np.asarray(x[np.searchsorted(needed, validation)]),
        rows["label"][validation],
        options=Options(
            evaluate.geometry.thresholds,
            evaluate.geometry.densities,
            evaluate.geometry.neighbours,
            choose_device().type,
        ),
        max_points=evaluate.geometry.max_points,
        graph_points=evaluate.geometry.graph_points,
        # The same points for every trial, so that a difference is never one of sampling.
        seed=derive_seed("geometry"),
        references=evaluate.geometry.references,
        subsamples=evaluate.geometry.subsamples,
        groups=rows["group"][validation],
        spans=embed_spans(spec, model, store, validation),
    )
    geometry = [
        {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row._asdict().items()}
        for row in measured
    ]
    return {"scores": scores, "confusions": confusions, "geometry": geometry}


def embed_spans(
    spec: TrialSpec, model: Callable[[], nn.Module], store: TokenStore, rows: Ints
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Embeddings [m, D] of two spans of each of some rows, for the geometry; None where none are asked for."""
    evaluate = spec.settings.evaluate
    if not evaluate.geometry.spans:
        return None
    vocabulary = Vocabulary(**read_info(Path(spec.results) / FOLDER / spec.tokenizer))
    sides = [
        embed(
            model(), side, np.arange(len(side.lengths)), vocabulary,
            max_length=spec.settings.corpus.max_length, long_documents="truncate",
            half=is_half(evaluate.precision, model()),
        )
        for side in pair_spans(store, rows, evaluate.geometry.spans, evaluate.retrieval)
    ]  # fmt: skip
    return sides[0], sides[1]


def state_rows(
    spec: TrialSpec, model: Callable[[], nn.Module], encoder: str, tokens: str, store: TokenStore, needed: Ints
) -> Stage:
    """Hidden states of some rows of a table of tokens (by its stage's id) at the job's boundaries, kept by content.

    `encoder` is what `name_weights` says.
    """
    root, corpus = Path(spec.results) / FOLDER, spec.settings.corpus
    vocabulary = Vocabulary(**read_info(root / spec.tokenizer))
    key = _embedding_key(spec, encoder, tokens, needed)
    depths, precision = list_boundaries(spec.settings), spec.settings.evaluate.precision
    return keep_states(Path(spec.results), key, model, store, needed, vocabulary, corpus, depths, precision)


def name_weights(spec: TrialSpec, encoder: str) -> str:
    """What names the weights that embed, of an encoder's stage: where none was trained or drawn, they have no seed."""
    untouched = spec.settings.pretrain.objective == "none" and spec.encoder_path is not None
    return name_start(spec.encoder_digest) if untouched else encoder


def _embedding_key(spec: TrialSpec, encoder: str, tokens: str, needed: Ints) -> dict[str, Any]:
    corpus = spec.settings.corpus
    return {
        "encoder": encoder,
        "tokens": tokens,
        "rows": digest(needed.tolist()),
        "max_length": corpus.max_length,
        "long_documents": corpus.long_documents,
        "precision": spec.settings.evaluate.precision,
    }


def embed_rows(
    spec: TrialSpec,
    model: Callable[[], nn.Module],
    encoder: str,
    task: str,
    store: TokenStore,
    needed: Ints,
    states: Stage | None = None,
) -> Stage:
    """Embeddings of some rows of a task's tokens, kept by content: embeddings.npy, float32 [len(needed), D].

    `encoder` is what `name_weights` says, `model` opens it. The pass that made `states` made them already.
    """
    corpus, root = spec.settings.corpus, Path(spec.results) / FOLDER

    def build(folder: Path) -> dict[str, Any]:
        if states is not None:
            shutil.copy(states.path / "embeddings.npy", folder)
            return {"rows": len(needed), "precision": states.info["precision"]}
        half = is_half(spec.settings.evaluate.precision, model())
        x = embed(
            model(),
            store,
            needed,
            Vocabulary(**read_info(root / spec.tokenizer)),
            max_length=corpus.max_length,
            long_documents=corpus.long_documents,
            half=half,
        )
        np.save(folder / "embeddings.npy", x)
        return {"rows": len(x), "precision": name_precision(half)}

    return build_stage(Path(spec.results), "embed", _embedding_key(spec, encoder, spec.tokens[task], needed), build)
