"""Evaluation of an encoder: embeddings, few-shot scores and geometry, on validation or, once unsealed, on test."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from raylab.blocks import Evaluate
from raylab.corpus import TRAIN, VALIDATION, open_rows
from raylab.draws import draw_shots
from raylab.encoder import choose_device, embed, load_encoder
from raylab.finetune import fine_tune
from raylab.geometry import Options, measure_geometry
from raylab.heldout import pair_spans
from raylab.identity import digest
from raylab.noise import derive_seed
from raylab.probes import PROBES
from raylab.scores import list_confusions, list_scores
from raylab.specs import TrialSpec
from raylab.stages import FOLDER, Stage, build_stage, read_info
from raylab.tokens import TokenStore, Vocabulary, open_tokens

Ints = NDArray[np.int64]


class Draw(NamedTuple):
    """One choice of training rows: `shots` a class (None: all), the `draw`-th, as rows of the task's table."""

    shots: int | None
    draw: int
    rows: Ints


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


def list_draws(rows: dict[str, NDArray[Any]], task: str, evaluate: Evaluate, seed: int) -> Iterator[Draw]:
    """The draws of a task under a seed, the same for every arm. All training rows are one draw."""
    train = np.flatnonzero(rows["part"] == TRAIN)
    for shots in evaluate.shots:
        number = None if shots == "full" else shots
        for draw in range(evaluate.draws if number else 1):
            chosen = draw_shots(rows["label"][train], rows["group"][train], number, seed=seed, task=task, draw=draw)
            yield Draw(number, draw, train[chosen])


def evaluate_encoder(spec: TrialSpec, stage_id: str, rung: int, open_encoder: Callable[[], nn.Module]) -> Evaluation:
    """Scores and geometry of a rung's encoder on the validation rows of every evaluated task.

    `open_encoder` is called only where an evaluation is not there yet: another job may have done it.
    """
    opened: list[nn.Module] = []

    def model() -> nn.Module:
        if not opened:
            opened.append(open_encoder())
        return opened[0]

    result = Evaluation([], [], [], [])
    for task in spec.settings.evaluate.tasks or spec.settings.corpus.tasks:
        result.stages.extend(_evaluate_task(spec, stage_id, task, model))
        done = result.stages[-1]
        rows = json.loads((done.path / "rows.json").read_text())
        common = {"rung": rung, "task": task, "split": "validation"}
        result.scores.extend(common | row for row in rows["scores"])
        result.confusions.extend(common | row for row in rows["confusions"])
        result.geometry.extend(common | row for row in rows["geometry"])
    return result


def _evaluate_task(spec: TrialSpec, encoder: str, task: str, model: Callable[[], nn.Module]) -> tuple[Stage, Stage]:
    """The embeddings and the evaluation of an encoder's stage on a task, kept by content."""
    evaluate, root = spec.settings.evaluate, Path(spec.results) / FOLDER
    measures = evaluate.model_dump(mode="json", exclude={"tasks", "retrieval"})
    if all(depth == "all" for depth in evaluate.frozen_layers):
        del measures["fine_tune"]
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

    built: list[Stage] = []

    def open_embeddings(store: TokenStore, needed: Ints) -> NDArray[np.float32]:
        built.append(embed_rows(spec, model, encoder, task, store, needed))
        x: NDArray[np.float32] = np.load(built[0].path / "embeddings.npy", mmap_mode="r")
        return x

    def build(folder: Path) -> dict[str, Any]:
        found = measure_task(spec, task, model, open_embeddings)
        (folder / "rows.json").write_text(json.dumps(found, allow_nan=False))
        return {"embedded": built[0].stage_id}

    done = build_stage(Path(spec.results), "evaluate", key, build)
    # Found, its embeddings were used none the less.
    embedded = done.info["embedded"]
    return built[0] if built else Stage("embed", embedded, root / embedded, True, 0.0, {}), done


def measure_task(
    spec: TrialSpec,
    task: str,
    model: Callable[[], nn.Module],
    open_embeddings: Callable[[TokenStore, Ints], NDArray[np.float32]],
) -> dict[str, list[dict[str, Any]]]:
    """Scores, confusions and geometry of an encoder on a task's validation rows, as plain rows; nothing is kept.

    `open_embeddings(store, rows)` gives the embeddings [len(rows), D] of some rows of the task.
    """
    evaluate, root = spec.settings.evaluate, Path(spec.results) / FOLDER
    rows = open_rows(root / spec.corpus, task)
    store = open_tokens(root / spec.tokens[task])
    validation = np.flatnonzero(rows["part"] == VALIDATION)
    draws = list(list_draws(rows, task, evaluate, spec.seed))
    needed = np.unique(np.concatenate([validation, *(draw.rows for draw in draws)]))
    x = open_embeddings(store, needed)
    scores, confusions = score_draws(
        spec, model, task, draws, rows["label"], rows["group"], store,
        train_x=lambda chosen: x[np.searchsorted(needed, chosen)],
        eval_x=x[np.searchsorted(needed, validation)],
        eval_y=rows["label"][validation],
        eval_store=store,
        eval_rows=validation,
    )  # fmt: skip
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
        )
        for side in pair_spans(store, rows, evaluate.geometry.spans, evaluate.retrieval)
    ]  # fmt: skip
    return sides[0], sides[1]


def embed_rows(
    spec: TrialSpec, model: Callable[[], nn.Module], encoder: str, task: str, store: TokenStore, needed: Ints
) -> Stage:
    """Embeddings of some rows of a task's tokens, kept by content: embeddings.npy, float32 [len(needed), D].

    `encoder` is the id of the stage that holds it, `model` opens it.
    """
    corpus, root = spec.settings.corpus, Path(spec.results) / FOLDER
    key = {
        "encoder": encoder,
        "tokens": spec.tokens[task],
        "rows": digest(needed.tolist()),
        "max_length": corpus.max_length,
        "long_documents": corpus.long_documents,
    }

    def build(folder: Path) -> dict[str, Any]:
        x = embed(
            model(),
            store,
            needed,
            Vocabulary(**read_info(root / spec.tokenizer)),
            max_length=corpus.max_length,
            long_documents=corpus.long_documents,
        )
        np.save(folder / "embeddings.npy", x)
        return {"rows": len(x)}

    return build_stage(Path(spec.results), "embed", key, build)


def score_draws(
    spec: TrialSpec,
    model: Callable[[], nn.Module],
    task: str,
    draws: list[Draw],
    labels: NDArray[Any],
    groups: Ints,
    store: TokenStore,
    *,
    train_x: Any,
    eval_x: NDArray[np.float32],
    eval_y: NDArray[Any],
    eval_store: TokenStore,
    eval_rows: Ints,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of scores and of confusions for every shots, draw, freeze depth and probe.

    `train_x(rows)` gives embeddings [n, D].
    """
    evaluate, root = spec.settings.evaluate, Path(spec.results) / FOLDER
    classes = read_info(root / spec.corpus)["classes"][task]
    num_classes = len(classes)
    scores: list[dict[str, Any]] = []
    confusions: list[dict[str, Any]] = []
    vocabulary = Vocabulary(**read_info(root / spec.tokenizer))
    for draw in draws:
        train_y = labels[draw.rows]
        for depth in evaluate.frozen_layers:
            for probe in evaluate.probes if depth == "all" else ("head",):
                seed = derive_seed(spec.seed, "probe", task, probe, depth, str(draw.shots), draw.draw)
                if probe == "head":
                    probabilities = fine_tune(
                        model(), store, draw.rows, train_y, eval_rows, vocabulary,
                        depth=depth, num_classes=num_classes, corpus=spec.settings.corpus,
                        settings=evaluate.fine_tune, seed=seed, eval_store=eval_store,
                    )  # fmt: skip
                else:
                    probabilities = PROBES[probe](
                        train_x(draw.rows), train_y, eval_x,
                        num_classes=num_classes, seed=seed % 2**32, selection=evaluate.selection,
                        groups=groups[draw.rows],
                    )  # fmt: skip
                cell = {"shots": draw.shots, "frozen_layers": depth, "probe": probe, "draw": draw.draw}
                sizes = {"num_train": len(draw.rows), "num_eval": len(eval_y)}
                scores += [cell | row | sizes for row in list_scores(eval_y, probabilities, classes)]
                confusions += [cell | row for row in list_confusions(eval_y, probabilities, classes)]
    return scores, confusions
