"""The test split, opened on purpose: kept encoders are scored on it, and every access is recorded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from raylab.base.mistakes import JobError
from raylab.data.corpus import VALIDATION, digest_column, open_rows
from raylab.data.labels import to_array
from raylab.data.tokens import Vocabulary, open_tokens, store_tokens
from raylab.evaluation.activations import STATES, Texts, join_texts, open_states, open_texts
from raylab.evaluation.baselines import BASELINES, score_baselines
from raylab.evaluation.cells import Inputs, score_draws
from raylab.evaluation.draws import list_draws
from raylab.evaluation.evaluation import embed_rows, name_weights, open_encoder, state_rows
from raylab.evaluation.probes import Rows
from raylab.job.specs import Job, TrialSpec
from raylab.results.tables import list_trials, now, write_rows
from raylab.runs.preparation import Preparation, find_last_rung, make_spec, name_point, prepare
from raylab.runs.trial import set_threads
from raylab.search.search import is_current, read_values
from raylab.store.stages import FOLDER, Stage, prune_stage, read_info
from raylab.training.embedding import embed
from raylab.training.encoder import is_half


def unseal_job(
    job: Job, results: Path, arms: list[str], *, by: str, reason: str, tell: Callable[[str], None]
) -> list[str]:
    """Scores complete trials of fixed designs and confirmations on the test split; returns their ids.

    Raises JobError where the data are not those that the trials saw, or an arm has no such trial. The access is
    recorded before the first score is written.
    """
    preparation = prepare(job, results)
    base, _ = name_point(preparation, {})
    empty = [task for task in job.evaluate.tasks or job.corpus.tasks if not len(preparation.split(0).sealed[task])]
    if empty:
        raise JobError([f"unseal: the split has no test rows of {', '.join(empty)}; there is nothing to score"])
    rows = [
        row
        for row in list_trials(results, job.name)
        if row["status"] == "complete" and row["phase"] in ("fixed", "confirm")
    ]
    baselines = {row["seed"] for row in rows if row["arm"].startswith("baseline:")}
    trials = [row for row in rows if not row["arm"].startswith("baseline:") and (not arms or row["arm"] in arms)]
    if not arms:  # else of an earlier version of the job, or of other data
        trials = [
            row for row in trials if is_current(job, row, lambda v: name_point(preparation, v)[0]) or row["arm"] == base
        ]
    missing = sorted(set(arms) - {row["arm"] for row in trials})
    if missing:
        raise JobError([f"unseal: arm '{arm}' has no complete ranked trial in {job.name}" for arm in missing])
    if not trials:
        raise JobError(
            [f"unseal: {job.name} has no complete ranked trial of this job and data; run it to the end first"]
        )
    specs = [_spec(preparation, row) for row in trials]
    set_threads(job.resources.cpus_per_worker)  # as when they ran: sums keep their order
    at, seeds = now(), sorted({row["seed"] for row in trials} & baselines)
    for trial_id in [
        *(row["trial_id"] for row in trials),
        *(f"baseline:{name}-{s}" for name in BASELINES for s in seeds),
    ]:
        record = {"at": at, "by": by, "reason": reason}
        write_rows(results, job.name, "unseals", trial_id, [record], f".{at:%Y%m%dT%H%M%S%f}")
    for index, (spec, row) in enumerate(zip(specs, trials, strict=True)):
        scores, confusions = score_test(preparation, spec, row)
        write_rows(results, job.name, "scores", row["trial_id"], scores, ".test")
        write_rows(results, job.name, "confusions", row["trial_id"], confusions, ".test")
        tell(f"unsealed {index + 1}/{len(trials)} {row['trial_id']}")
    for seed in seeds:
        score_baselines(results, job, preparation.split(seed), seed, sealed=True)
    return [row["trial_id"] for row in trials]


def _spec(preparation: Preparation, row: dict[str, Any]) -> TrialSpec:
    spec = make_spec(preparation, read_values(preparation.job, row), row["seed"], row["phase"])
    if spec.arm != row["arm"]:
        raise JobError([f"unseal: the data or job of {row['trial_id']} have changed since it ran; restore them"])
    return spec


def score_test(
    preparation: Preparation, spec: TrialSpec, row: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores and confusions of a trial's last rung on the test rows, with the draws of validation."""
    results, root = preparation.results, preparation.results / FOLDER
    folder = find_last_rung(results, spec.job, spec.trial_id)
    if folder is None:
        raise JobError([f"unseal: the encoder of {spec.trial_id} is gone from {root}; run the job again"])
    stage = Stage("pretrain", folder.name, folder, True, 0.0, {})
    model = open_encoder(stage)
    split, corpus = preparation.split(spec.seed), spec.settings.corpus
    tokenizer = Stage("tokenizer", spec.tokenizer, root / spec.tokenizer, True, 0.0, {})
    scores: list[dict[str, Any]] = []
    confusions: list[dict[str, Any]] = []
    for task in spec.settings.evaluate.tasks or corpus.tasks:
        sealed = split.sealed[task]
        sealed_tokens = store_tokens(results, sealed["text"], digest_column(sealed["text"]), tokenizer)
        found = _score_task(spec, model, name_weights(spec, stage.stage_id), task, sealed, sealed_tokens)
        common = {"rung": row["num_rungs"], "task": task, "split": "test"}
        for rows_of, new in zip((scores, confusions), found, strict=True):
            rows_of += [common | new_row for new_row in new]
    return scores, confusions


def _score_task(
    spec: TrialSpec, model: nn.Module, encoder: str, task: str, sealed: pa.Table, sealed_tokens: Stage
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The scores and confusions of a task's sealed rows; their tokens are a stage, their embeddings are not kept."""
    results, root, corpus = Path(spec.results), Path(spec.results) / FOLDER, spec.settings.corpus
    rows, store = open_rows(root / spec.corpus, task), open_tokens(root / spec.tokens[task])
    sealed_store, everything = open_tokens(sealed_tokens.path), np.arange(len(sealed))
    draws = list(list_draws(rows, task, spec.settings.evaluate, spec.seed))
    # As for the validation scores: those rows' embeddings are there already.
    validation = np.flatnonzero(rows["part"] == VALIDATION)
    needed = np.unique(np.concatenate([validation, *(draw.rows for draw in draws)]))
    x = np.load(embed_rows(spec, lambda: model, encoder, task, store, needed).path / "embeddings.npy")
    vocabulary = Vocabulary(**read_info(root / spec.tokenizer))
    eval_x = embed(
        model, sealed_store, everything, vocabulary,
        max_length=corpus.max_length, long_documents=corpus.long_documents,
        half=is_half(spec.settings.evaluate.precision, model),
    )  # fmt: skip
    states: list[Stage] = []

    def open_both(depth: str) -> Texts:
        parts = ((spec.tokens[task], store, needed), (sealed_tokens.stage_id, sealed_store, everything))
        if depth == "none":
            return join_texts(*(open_texts(of, chosen, vocabulary, corpus) for _, of, chosen in parts))
        if not states:
            states.extend(state_rows(spec, lambda: model, encoder, *part) for part in parts)
        return join_texts(*(open_states(state.path, depth) for state in states))

    # Sealed rows stand behind the others, under numbers of their own.
    numbers = np.concatenate([needed, everything + len(rows["label"])])
    inputs = Inputs(numbers, np.concatenate([x, eval_x]), open_both, spec.tokens[task], None)
    judges = Rows(inputs.find(validation), rows["label"][validation])
    wanted = Rows(len(needed) + everything, to_array(sealed["label"]))
    found = score_draws(spec, lambda: model, task, draws, rows["label"], rows["group"], inputs, judges, wanted)
    for state, drop in zip(states, (STATES, ""), strict=False):  # of the sealed rows nothing stays but their tokens
        prune_stage(results, state.stage_id, (drop,))
    return found
