"""Pre-training: a chain of rungs kept by content; going on from one gives the numbers of not having stopped."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raylab.base.noise import derive_seed
from raylab.base.world import ALONE, World
from raylab.data.corpus import DOCUMENTS, TRAIN, VALIDATION, open_rows
from raylab.data.tokens import Vocabulary, open_tokens
from raylab.job.specs import TrialSpec
from raylab.store.stages import FOLDER, Stage, build_stage, find_stage, name_stage, peek_stage, prune_stage, read_info
from raylab.training.batches import UNITS, Units, describe_spans
from raylab.training.encoder import build_encoder, is_half, load_encoder, name_precision, save_encoder
from raylab.training.heldout import compute_unigram_entropy, measure_heldout, prepare_heldout
from raylab.training.loop import (
    ENCODER,
    OPTIMIZER,
    Data,
    Progress,
    Training,
    load_learner,
    load_training,
    save_training,
    train,
)
from raylab.training.objectives import Learner
from raylab.training.rungs import Link, data_key, name_start, rung_budget, start_key
from raylab.training.steps import Place, list_seen


def open_data(spec: TrialSpec) -> Data:
    """Maps the documents' tokens and coded columns."""
    root = Path(spec.results) / FOLDER
    rows = open_rows(root / spec.corpus, DOCUMENTS)
    metadata = spec.settings.pretrain.metadata.field if spec.settings.pretrain.objective == "metadata" else None
    names = read_info(root / spec.corpus)["categories"]
    return Data(
        open_tokens(root / spec.tokens[DOCUMENTS]),
        rows,
        Vocabulary(**read_info(root / spec.tokenizer)),
        rows[metadata] if metadata else None,
        len(names[metadata]) if metadata else 0,
    )


def start_rung(spec: TrialSpec, data: Data, world: World = ALONE, *, whole: bool = True) -> Stage:
    """Rung 0: the encoder as it starts; shared by all arms of a seed, in any job. `whole`: not without its weights."""

    def build(folder: Path) -> dict[str, Any]:
        if world.rank == 0:
            model, _ = _make_encoder(spec, data)
            save_encoder(model, Path(spec.results) / FOLDER / spec.tokenizer, folder / "encoder")
            (folder / "progress.json").write_text(json.dumps(Progress().__dict__))
        return {"step": 0, "tokens": 0, "documents": 0, "flops": 0.0, "precision": None, "spans": None}

    return build_stage(Path(spec.results), "pretrain", start_key(spec), build, world, needs=ENCODER if whole else None)


def train_rung(
    spec: TrialSpec,
    data: Data,
    chain: Sequence[Link],
    rung: int,
    training: Training | None,
    world: World = ALONE,
    *,
    whole: bool = True,
) -> tuple[Stage, Training | None]:
    """The stage of a rung, found or trained from the newest checkpoint before it; and the training, if it ran.

    `whole`: a rung whose weights were pruned is trained again. All workers of a trial call this together. Raises
    NotFiniteError, InfeasibleError where no document fits, and BusyError where another process trains this rung.
    """
    pretrain, results = spec.settings.pretrain, Path(spec.results)
    result: list[Training] = []

    def build(folder: Path) -> dict[str, Any]:
        live = training or _open_training(spec, data, chain, rung - 1, world)
        units = make_units(spec, data)
        chunk_tokens = spec.settings.resources.chunk_tokens
        train(live, units, data, pretrain, spec.seed, rung_budget(pretrain, rung), world, chunk_tokens=chunk_tokens)
        result.append(live)
        if world.rank == 0:
            save_training(live, results / FOLDER / spec.tokenizer, folder, last=chain[rung].last)
        seen = live.progress
        place = Place(seen.epoch, seen.position, tuple(seen.ahead))
        lengths = data.store.lengths[data.rows["part"] == TRAIN]
        return {
            "step": seen.step,
            "tokens": seen.tokens,
            "documents": len(np.unique(units.row[list_seen(units.num, spec.seed, place)])),
            "flops": seen.flops,
            "precision": name_precision(is_half(pretrain.precision, live.learner.encoder)),
            "spans": describe_spans(lengths, pretrain.declutr) if pretrain.objective == "declutr" else None,
        }

    needs = ENCODER if whole else None
    stage = build_stage(results, "pretrain", chain[rung].key, build, world, needs=needs, wait=False)
    if world.rank == 0 and not stage.reused:
        # Nobody goes on from the rung before any more.
        prune_stage(results, chain[rung - 1].stage_id, [OPTIMIZER])
    return stage, (result[0] if result else None)


def _open_training(spec: TrialSpec, data: Data, chain: Sequence[Link], rung: int, world: World) -> Training:
    """A training that is at `rung` or, where later checkpoints are gone or damaged, before it."""
    for at in range(rung, 0, -1):
        path = find_stage(Path(spec.results), chain[at].stage_id, OPTIMIZER)
        if world.broadcast(path is not None) and path is not None:
            return load_training(spec, data, path, resume=True, world=world)
    return load_training(spec, data, start_rung(spec, data, world).path, resume=False, world=world)


def _open_learner(spec: TrialSpec, data: Data, chain: Sequence[Link], rung: int) -> Learner:
    """The encoder and heads of a rung; trained again, in memory, where they were pruned."""
    path = find_stage(Path(spec.results), chain[rung].stage_id, ENCODER)
    if path is not None:
        return load_learner(spec, data, path, trained=rung > 0)
    training = _open_training(spec, data, chain, rung, ALONE)
    if rung:
        pretrain, chunk_tokens = spec.settings.pretrain, spec.settings.resources.chunk_tokens
        until = rung_budget(pretrain, rung)
        train(training, make_units(spec, data), data, pretrain, spec.seed, until, chunk_tokens=chunk_tokens)
    return training.learner


def measure_rung(spec: TrialSpec, data: Data, chain: Sequence[Link], rung: int, training: Training | None) -> Stage:
    """The held-out measures of a rung's encoder, as the info of a stage of their own: metric -> value.

    They are no part of the pre-training: other measures asked for train nothing again. Of weights from elsewhere that
    came without a masked-language head, the one that was drawn for them tells nothing: then there is no MLM loss.
    """
    retrieval, given = spec.settings.evaluate.retrieval, rung == 0 and spec.encoder_path is not None
    headless = given and is_headless(spec)
    key = {
        "encoder": name_start(spec.encoder_digest) if given else chain[rung].stage_id,
        "data": data_key(spec),
        "max_length": spec.settings.corpus.max_length,
        "retrieval": retrieval.model_dump(),
        "precision": spec.settings.evaluate.precision,
    }

    def build(folder: Path) -> dict[str, Any]:
        learner = training.learner if training else _open_learner(spec, data, chain, rung)
        rows = np.flatnonzero(data.rows["part"] == VALIDATION)
        held_out = prepare_heldout(data.store, rows, data.categories, data.vocabulary, spec.settings.corpus, retrieval)
        train_rows = np.flatnonzero(data.rows["part"] == TRAIN)
        entropy = compute_unigram_entropy(data.store, train_rows, held_out, data.vocabulary)
        half, head = is_half(spec.settings.evaluate.precision, learner.encoder), learner.head if rung else None
        # Shapes that training doesn't have are not worth compiling for.
        with torch.compiler.set_stance("force_eager"):
            measures = measure_heldout(learner.encoder, head, held_out, masked=not headless, half=half)
        return {"heldout_unigram_entropy": entropy} | measures

    return build_stage(Path(spec.results), "heldout", key, build)


def is_headless(spec: TrialSpec) -> bool:
    """Whether the weights that an encoder starts from came without a masked-language head."""
    info = peek_stage(Path(spec.results), name_stage("inspect", {"encoder": spec.encoder_digest}))
    return info is not None and bool(info["new_head"])


def read_curves(stages: Sequence[tuple[Stage, Stage]]) -> list[dict[str, Any]]:
    """The curve of a chain of rungs, given with their held-out measures: training to the last, held-out at each."""
    curves: list[dict[str, Any]] = []
    for stage, measured in stages:
        progress = json.loads((stage.path / "progress.json").read_text())
        here = {"step": progress["step"], "tokens": progress["tokens"]}
        curves += [here | {"metric": metric, "value": value} for metric, value in sorted(measured.info.items())]
    return curves + progress["curves"]


def make_units(spec: TrialSpec, data: Data) -> Units:
    """What the trial's objective draws from: the training documents."""
    train_rows = np.flatnonzero(data.rows["part"] == TRAIN)
    pretrain = spec.settings.pretrain
    return UNITS[pretrain.objective](data.store, train_rows, data.vocabulary, spec.settings.corpus, pretrain, spec.seed)


def _make_encoder(spec: TrialSpec, data: Data) -> tuple[nn.Module, bool]:
    start, seed = spec.settings.encoder, derive_seed(spec.seed, "weights")
    if start.config is not None:
        return build_encoder(start.config, data.vocabulary, spec.settings.corpus.max_length, seed), True
    assert spec.encoder_path is not None
    return load_encoder(spec.encoder_path, start.revision, seed)
