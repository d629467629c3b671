"""Fixtures that tests share: a small corpus of made-up notes, a tiny job on it, trials, and tiny encoders."""

import copy
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from raylab.data.synth import write_notes
from raylab.results.tables import OF_A_RUN

# Read when torch, transformers and tokenizers are first imported: one thread, so that numbers don't depend on the
# machine's cores, and no network.
for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)

# Tests that run in the background ignore SIGINT, and so would the commands that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files with slow tests go first: processes share the files, and none should be left with a slow one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = ("roberta", "xlm-roberta", "bert", "distilbert", "modernbert")


@pytest.fixture(scope="session")
def notes(tmp_path_factory):
    """A folder with notes.parquet: 150 notes of 30 to 80 words, each some 150 to 400 tokens of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("notes")
    write_notes(folder, num_notes=150, seed=0, max_words=80)
    return folder


@pytest.fixture(scope="session")
def tiny_job(notes):
    """A job as a plain mapping, to copy and change; a trial of it takes about a second."""
    table = {"path": str(notes / "notes.parquet"), "text": "text", "group": "patient"}
    return {
        "name": "tiny",
        "corpus": {
            "documents": table,
            "tasks": {task: {**table, "label": task} for task in ("condition", "severity")},
            "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
            "max_length": 64,
        },
        "encoder": {"config": ENCODER, "tokenizer": {"vocab_size": 400}},
        "pretrain": {
            "objective": "mlm",
            "num_tokens": 12_000,
            "rungs": 2,
            "batch_tokens": 1024,
            "learning_rate": 1e-3,
        },
        "evaluate": {
            "tasks": ["severity"],
            "shots": [2],
            "draws": 2,
            "probes": ["logistic"],
            "geometry": {"max_points": 100, "graph_points": 50},
            "retrieval": {"span": 16, "candidates": 8},
        },
    }


# What each objective needs beside the tiny job's settings.
OBJECTIVES = {
    "mlm": {},
    "declutr": {
        "pretrain.objective": "declutr",
        "pretrain.declutr": {"num_anchors": 2, "num_positives": 2, "max_span": 24, "min_span": 8},
    },
    "cross_entropy": {"pretrain.objective": "metadata", "pretrain.metadata": {"field": "category"}},
    "supervised_contrastive": {
        "pretrain.objective": "metadata",
        "pretrain.metadata": {"field": "category", "loss": "supervised_contrastive"},
    },
}


@pytest.fixture(scope="session")
def make_job(tiny_job):
    """`make_job("declutr", {"pretrain.rungs": 3})`: the tiny job with an objective and dotted settings changed."""
    from raylab.job.jobs import check_job, merge

    def make(objective="mlm", changes=None):
        raw = copy.deepcopy(tiny_job)
        for name, value in {**OBJECTIVES[objective], **(changes or {})}.items():
            block = value
            for part in reversed(name.split(".")):
                block = {part: block}
            raw = merge(raw, block)
        return check_job(raw)

    return make


# The columns that an interrupted run must share with an unbroken one, by table (promise 1 of the design).
VALUES = {
    "scores": "trial_id, rung, task, split, shots, frozen_layers, probe, draw, metric, class, value, num_train, "
    "num_eval, selection, parameters_updated",
    "confusions": "trial_id, rung, task, split, shots, frozen_layers, probe, draw, class, predicted, count",
    "geometry": "trial_id, rung, task, split, metric, parameter, value, num_points, reference, low, high",
    "curves": "trial_id, step, tokens, metric, value",
    "stages": "trial_id, stage_id, kind",
    "trials": "trial_id, arm, phase, seed, status, rung, target_values, num_steps, num_tokens, data_digest",
}


# Of the curves, times, memory and padding are left out.
SAME = {"curves": f"metric not in {OF_A_RUN}"}


@pytest.fixture(scope="session")
def read_values():
    """`read_values(results)`: table -> its rows of those columns, sorted; every job's."""
    from raylab.results.queries import open_tables

    def read(results):
        connection = open_tables(results)
        return {
            table: connection.execute(
                f"select {columns} from {table} where {SAME.get(table, True)} order by all"
            ).fetchall()
            for table, columns in VALUES.items()
        }

    return read


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A results folder that all tests share: stages that one test built serve the next."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def make_spec(make_job, results):
    """`make_spec("declutr", {"pretrain.rungs": 3}, seed=1)`: a trial that can run, in `results` or a folder given."""
    from raylab.runs.preparation import make_spec, prepare

    def make(objective="mlm", changes=None, *, seed=0, folder=None):
        return make_spec(prepare(make_job(objective, changes), folder or results), {}, seed, "fixed")

    return make


@pytest.fixture(scope="session")
def make_store():
    """`make_store([5, 80])`: random tokens of 5 to 399 for texts of such lengths."""
    from raylab.data.tokens import TokenStore

    def make(lengths, seed=0):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return TokenStore(np.random.default_rng(seed).integers(5, 400, offsets[-1], dtype=np.int32), offsets)

    return make


@pytest.fixture(scope="session")
def vocabulary():
    """The tiny tokenizer's: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> 4, 400 tokens."""
    from raylab.data.tokens import Vocabulary

    return Vocabulary(prefix_id=0, suffix_id=2, pad_id=1, mask_id=4, special_ids=[0, 1, 2, 3, 4], size=400)


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory, make_spec):
    """A Hugging Face directory of each supported family: random weights, two layers, the tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from raylab.store.stages import FOLDER
    from raylab.training.encoder import save_encoder

    spec = make_spec()
    names = {
        "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "modernbert": {**ENCODER, "local_attention": 8},
    }
    torch.manual_seed(0)
    folders = {}
    for family in FAMILIES:
        config = AutoConfig.for_model(
            family,
            vocab_size=400,
            max_position_embeddings=80,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
            cls_token_id=0,
            sep_token_id=2,
            **names.get(family, ENCODER),
        )
        folders[family] = tmp_path_factory.mktemp("encoders") / family
        save_encoder(
            AutoModelForMaskedLM.from_config(config), Path(spec.results) / FOLDER / spec.tokenizer, folders[family]
        )
    return folders
