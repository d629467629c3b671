"""The commands: a wrong request ends with exit code 2 and one line a mistake, and leaves nothing behind."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raylab.cli import main
from raylab.job.specs import Job

MARKER = "SECRETPATIENT"
NUM_ROWS = 60


def make_rows() -> dict[str, list[Any]]:
    numbers = range(NUM_ROWS)
    return {
        "text": [f"{MARKER} {i} was seen on the ward with a cough and {'fever' if i % 2 else 'rash'}" for i in numbers],
        "kind": ["fever" if i % 2 else "rash" for i in numbers],
        "one": ["same"] * NUM_ROWS,
        "patient": [f"p{i}" for i in numbers],
        "pair": [f"p{i // 2}" for i in numbers],
        "part": [("train", "validation", "test")[i % 3] for i in numbers],
        "odd": [("train", "validation", "later")[i % 3] for i in numbers],
        "length": list(numbers),
        "share": [i / 7 for i in numbers],
    }


def make_job() -> dict[str, Any]:
    return {
        "name": "good",
        "corpus": {
            "documents": {"path": "notes.parquet", "text": "text", "group": "patient"},
            "tasks": {"kind": {"path": "notes.parquet", "text": "text", "label": "kind", "group": "patient"}},
            "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
            "max_length": 32,
        },
        "encoder": {
            "config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
            "tokenizer": {"vocab_size": 300},
        },
        "pretrain": {"objective": "mlm", "num_tokens": 2048, "batch_tokens": 512},
        "evaluate": {"shots": [2], "draws": 1, "probes": ["logistic"], "retrieval": {"span": 8}},
        "search": {"seeds": [0]},
    }


TPE = {"design": "tpe", "num_arms": 2, "targets": [{"task": "kind"}], "space": {"pretrain.learning_rate": [1e-3, 1e-4]}}
DECLUTR = {"objective": "declutr", "declutr": {"max_span": 8, "min_span": 4}}
TASK = {"text": "text", "label": "kind", "group": "patient"}


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the job: the value at a path with slashes."""

    def change(job: dict[str, Any]) -> None:
        *blocks, last = path.split("/")
        for block in blocks:
            job = job.setdefault(block, {})
        job[last] = copy.deepcopy(value)

    return change


def drop(path: str) -> Callable[[dict[str, Any]], None]:
    def change(job: dict[str, Any]) -> None:
        *blocks, last = path.split("/")
        for block in blocks:
            job = job[block]
        del job[last]

    return change


def both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(job: dict[str, Any]) -> None:
        for one in changes:
            one(job)

    return change


def space(name: str, entry: Any, **search: Any) -> Callable[[dict[str, Any]], None]:
    return put("search", {"space": {name: entry}, **search})


TARGET = "search.targets.0"
SPACE = "search.space"
# What is wrong -> the change of the good job, and (key path, part of the fix) of each line on stderr.
BAD: dict[str, tuple[Callable[[dict[str, Any]], None], list[tuple[str, str]]]] = {
    # keys
    "unknown key at the top": (put("pretrian", {}), [("pretrian", "did you mean 'pretrain'?")]),
    "unknown key in corpus": (put("corpus/max_lenght", 3), [("corpus.max_lenght", "did you mean 'max_length'?")]),
    "unknown key in documents": (put("corpus/documents/grup", "x"), [("corpus.documents.grup", "mean 'group'?")]),
    "unknown key in a task": (put("corpus/tasks/kind/txt", "x"), [("corpus.tasks.kind.txt", "mean 'text'?")]),
    "unknown key in the split": (put("corpus/split/sead", 1), [("corpus.split.sead", "mean 'seed'?")]),
    "unknown key in the config": (put("encoder/config/hiden_size", 8), [("encoder.config.hiden_size", "hidden_size")]),
    "unknown key in a loss": (put("pretrain/mlm", {"wieght": 1}), [("pretrain.mlm.wieght", "mean 'weight'?")]),
    "unknown key in evaluate": (put("evaluate/fine_tune", {"step": 1}), [("evaluate.fine_tune.step", "'steps'?")]),
    "unknown key in a target": (
        put("search", TPE | {"targets": [{"task": "kind", "metrc": "accuracy"}]}),
        [(f"{TARGET}.metrc", "did you mean 'metric'?")],
    ),
    "unknown key in a range": (
        space("pretrain.learning_rate", {"low": 0.1, "high": 1.0, "stepp": 0.1}),
        [(f"{SPACE}.pretrain.learning_rate.stepp", "did you mean 'step'?")],
    ),
    "unknown key like no other": (put("limits", {"xyz": 1}), [("limits.xyz", "valid names: hours")]),
    "a needed key misspelt": (
        both(drop("corpus/tasks/kind/label"), put("corpus/tasks/kind/labl", "kind")),
        [("corpus.tasks.kind.labl", "did you mean 'label'?")],
    ),
    "a needed key left out": (drop("corpus/documents/text"), [("corpus.documents.text", "is missing; add it")]),
    # types and ranges
    "a word for a number": (put("pretrain/num_tokens", "many"), [("pretrain.num_tokens", 'valid integer (is "many")')]),
    "a fraction for a whole number": (put("pretrain/rungs", 1.5), [("pretrain.rungs", "(is 1.5)")]),
    "a number in quotes": (put("pretrain/learning_rate", "0.1"), [("pretrain.learning_rate", 'valid number (is "')]),
    "a mapping for a number": (put("pretrain/rungs", {"a": 1}), [("pretrain.rungs", "valid integer")]),
    "a number for a block": (put("pretrain", 5), [("pretrain", "a mapping of keys to values (is 5)")]),
    "a number for truth": (put("corpus/split/vary", 1), [("corpus.split.vary", "valid boolean (is 1)")]),
    "a bad job name": (put("name", "../up"), [("name", "must match pattern")]),
    "a number too small": (put("pretrain/learning_rate", 0), [("pretrain.learning_rate", "greater than 0 (is 0)")]),
    "a number too large": (put("pretrain/mlm", {"mask_fraction": 1}), [("pretrain.mlm.mask_fraction", "less than 1")]),
    "not a number": (put("pretrain/weight_decay", float("nan")), [("pretrain.weight_decay", "finite number")]),
    "an unknown choice": (put("pretrain/objective", "declutter"), [("pretrain.objective", "did you mean 'declutr'?")]),
    "shots of no kind": (put("evaluate/shots", [8, "all"]), [("evaluate.shots.1", "or must be one of 'full'")]),
    "shots of none": (put("evaluate/shots", [0]), [("evaluate.shots.0", "greater than or equal to 1")]),
    "an unknown depth": (put("evaluate/frozen_layers", ["some"]), [("evaluate.frozen_layers.0", "use all, none")]),
    "a depth beyond the layers": (put("evaluate/frozen_layers", ["3"]), [("evaluate.frozen_layers", "2 layers")]),
    "a cosine above 1": (
        put("evaluate/geometry", {"thresholds": [1.5]}),
        [("evaluate.geometry.thresholds.0", "less than or equal to 1")],
    ),
    "shots twice": (put("evaluate/shots", [2, 2]), [("evaluate", "'shots' names a value twice")]),
    "fractions not of 1": (put("corpus/split/train", 0.7), [("corpus.split", "must add up to 1, not 1.1")]),
    "fractions beside a column": (put("corpus/split/column", "part"), [("corpus.split", "leave out train")]),
    # encoder
    "two encoder starts": (put("encoder/pretrained", "x"), [("encoder", "exactly one of 'pretrained'")]),
    "no encoder start": (put("encoder", {}), [("encoder", "exactly one of 'pretrained'")]),
    "a config without tokenizer": (
        drop("encoder/tokenizer"),
        [("encoder", "'config' and 'tokenizer' belong together")],
    ),
    "heads that do not divide": (put("encoder/config/num_attention_heads", 3), [("encoder.config", "multiple of")]),
    "a revision of nothing": (put("encoder/revision", "main"), [("encoder", "'revision' needs 'pretrained'")]),
    "an encoder folder that is not there": (
        put("encoder", {"pretrained": "./gone"}),
        [("encoder.pretrained", "check")],
    ),
    "an encoder folder without config": (
        put("encoder", {"pretrained": "empty"}),
        [("encoder.pretrained", "config.json")],
    ),
    "an unknown trial": (put("encoder", {"trial": "x-0"}), [("encoder.trial", "raylab query")]),
    # corpus
    "a missing file": (put("corpus/documents/path", "gone.parquet"), [("corpus.documents.path", "--data DIR")]),
    "no file at all": (drop("corpus/documents/path"), [("corpus.documents", "exactly one of 'path' and 'sql'")]),
    "a root without sql": (put("corpus/documents/root", "x"), [("corpus.documents", "'root' is for 'sql'")]),
    "a root of no text": (put("corpus/documents/root", 5), [("corpus.documents.root", "valid string (is 5)")]),
    "a missing column": (put("corpus/documents/text", "txt"), [("corpus.documents.text", "nearest is 'text'")]),
    "a missing label": (put("corpus/tasks/kind/label", "kin"), [("corpus.tasks.kind.label", "nearest is 'kind'")]),
    "text of numbers": (put("corpus/documents/text", "length"), [("corpus.documents.text", "name another column")]),
    "labels of fractions": (put("corpus/tasks/kind/label", "share"), [("corpus.tasks.kind.label", "whole numbers")]),
    "a csv that is not UTF-8": (put("corpus/documents/path", "latin.csv"), [("corpus.documents.text", "as UTF-8")]),
    "an empty table": (put("corpus/documents/path", "empty.parquet"), [("corpus.documents", "has no rows")]),
    "an empty file": (put("corpus/documents/path", "empty.csv"), [("corpus.documents.path", "is empty (0 bytes)")]),
    "ids that repeat": (put("corpus/documents/id", "one"), [("corpus.documents.id", "ids must be unique")]),
    "one class": (put("corpus/tasks/kind/label", "one"), [("corpus.tasks.kind.label", "a task needs two")]),
    "classes too small": (
        put("corpus/tasks/kind/min_class_size", 99),
        [("corpus.tasks.kind.label", "min_class_size"), *[("corpus.tasks.kind", "add rows")] * 2],
    ),
    "group in one table only": (drop("corpus/tasks/kind/group"), [("corpus", "name one everywhere or nowhere")]),
    "a split column of unknown values": (
        put("corpus/split", {"column": "odd"}),
        [("corpus.documents", "corpus.split.values"), ("corpus.tasks.kind", "corpus.split.values")],
    ),
    "groups across a split column": (
        both(
            put("corpus/split", {"column": "part"}),
            put("corpus/documents/group", "pair"),
            put("corpus/tasks/kind/group", "pair"),
        ),
        [("corpus.split.column", "give each group one part")],
    ),
    "a task called documents": (
        put("corpus/tasks/documents", TASK | {"path": "notes.parquet"}),
        [("corpus.tasks.documents", "rename the task")],
    ),
    "sql of nothing": (
        put("corpus/documents", {"sql": "select * from 'gone.csv'", "text": "text", "group": "patient"}),
        [("corpus.documents.sql", "--data DIR")],
    ),
    # objectives and budgets
    "no metadata field": (put("pretrain/objective", "metadata"), [("pretrain.metadata.field", "name a column")]),
    "an unknown metadata field": (
        both(put("pretrain/objective", "metadata"), put("pretrain/metadata/field", "knd")),
        [("", "nearest is 'kind'")],
    ),
    "a metadata field of one value": (
        both(put("pretrain/objective", "metadata"), put("pretrain/metadata/field", "one")),
        [("pretrain.metadata.field", "under two values")],
    ),
    "a temperature that is not read": (
        put("pretrain", {"objective": "metadata", "metadata": {"field": "kind", "temperature": 0.2}}),
        [("pretrain.metadata.temperature", "cross_entropy does not read it; remove it")],
    ),
    "an unread block": (put("pretrain/declutr", {"max_span": 40}), [("pretrain.declutr", "remove the block")]),
    "a budget without objective": (
        put("pretrain", {"objective": "none", "num_tokens": 5}),
        [("pretrain.num_tokens", "remove it")],
    ),
    "a span over max_length": (
        put("pretrain", {"objective": "declutr", "declutr": {"max_span": 31, "min_span": 4}}),
        [("pretrain.declutr.max_span", "at most 30")],
    ),
    "a min_span over max_span": (
        put("pretrain", {"objective": "declutr", "declutr": {"max_span": 4, "min_span": 8}}),
        [("pretrain.declutr", "min_span (8) must not exceed max_span (4)")],
    ),
    "a document too short for its spans": (
        put("pretrain", {"objective": "declutr", "declutr": DECLUTR["declutr"] | {"min_document_length": 9}}),
        [("pretrain.declutr", "must be 16 or more")],
    ),
    "a budget too small": (put("pretrain/rungs", 5), [("pretrain.num_tokens", "raise it or lower those")]),
    "a step too small": (put("pretrain/batch_tokens", 16), [("pretrain.batch_tokens", "must be 32 or more")]),
    "a retrieval span too long": (put("evaluate/retrieval/span", 31), [("evaluate.retrieval.span", "at most 30")]),
    "an unknown task": (put("evaluate/tasks", ["kinds"]), [("evaluate.tasks", "did you mean 'kind'?")]),
    # search
    "a target of an unknown metric": (
        put("search", TPE | {"targets": [{"task": "kind", "metric": "f1_makro"}]}),
        [(f"{TARGET}.metric", "did you mean 'f1_macro'?")],
    ),
    "a target of an unknown task": (
        put("search", TPE | {"targets": [{"task": "kin"}]}),
        [(f"{TARGET}.task", "did you mean 'kind'?")],
    ),
    "target shots that are not evaluated": (
        put("search", TPE | {"targets": [{"task": "kind", "shots": 32}]}),
        [(f"{TARGET}.shots", "valid: 2")],
    ),
    "a target depth that is not evaluated": (
        put("search", TPE | {"targets": [{"task": "kind", "frozen_layers": "none"}]}),
        [(f"{TARGET}.frozen_layers", "valid: all")],
    ),
    "a geometry target with shots": (
        put("search", TPE | {"targets": [{"table": "geometry", "metric": "uniformity", "task": "kind", "shots": 2}]}),
        [(TARGET, "leave them out")],
    ),
    "a geometry target at a threshold that is not measured": (
        put("search/targets", [{"table": "geometry", "metric": "graph_components", "task": "kind", "parameter": 0.6}]),
        [(f"{TARGET}.parameter", "0.6 is not measured; measured at: 0.5, 0.7, 0.9")],
    ),
    "a geometry target with a parameter too many": (
        put("search/targets", [{"table": "geometry", "metric": "silhouette", "task": "kind", "parameter": 2}]),
        [(f"{TARGET}.parameter", "silhouette has none; leave it out")],
    ),
    "a space of an unknown setting": (
        space("pretrain.learning_rat", [1]),
        [(f"{SPACE}.pretrain.learning_rat", "did you mean 'pretrain.learning_rate'?")],
    ),
    "a space of the corpus": (space("corpus.split.seed", [1]), [(f"{SPACE}.corpus.split.seed", "can be searched")]),
    "a space of rungs": (space("pretrain.rungs", [1, 2]), [(f"{SPACE}.pretrain.rungs", "can't be searched")]),
    "a space of an unread block": (
        space("pretrain.declutr.max_span", [8]),
        [(f"{SPACE}.pretrain.declutr.max_span", "remove it")],
    ),
    "a space of a temperature that is not read": (
        both(
            put("pretrain", {"objective": "metadata", "metadata": {"field": "kind"}}),
            space("pretrain.metadata.temperature", [0.1, 0.2]),
        ),
        [(f"{SPACE}.pretrain.metadata.temperature", "remove it")],
    ),
    "a space of a config that is not there": (
        both(put("encoder", {"pretrained": "x"}), space("encoder.config.dropout", [0.0])),
        [(f"{SPACE}.encoder.config.dropout", "set encoder.config")],
    ),
    "a choice out of range": (
        space("pretrain.mlm.mask_fraction", [0.1, 1.5]),
        [(f"{SPACE}.pretrain.mlm.mask_fraction", "less than 1 (is 1.5)")],
    ),
    "a depth that is none": (
        space("evaluate.frozen_layers", ["all", "some"]),
        [(f"{SPACE}.evaluate.frozen_layers.0", 'a number of layers in quotes (is "some")')],
    ),
    "a searched task that is none": (space("evaluate.tasks", ["kin"]), [("evaluate.tasks", "mean 'kind'?")]),
    "no choices": (space("pretrain.accumulation", []), [(f"{SPACE}.pretrain.accumulation.choices", "at least 1")]),
    "choices twice": (space("pretrain.accumulation", [1, 1]), [(f"{SPACE}.pretrain.accumulation", "twice")]),
    "a range of words": (
        space("pretrain.objective", {"low": 1, "high": 2}),
        [(f"{SPACE}.pretrain.objective", "list its 'choices'")],
    ),
    "a range upside down": (
        space("pretrain.accumulation", {"low": 2, "high": 1}),
        [(f"{SPACE}.pretrain.accumulation", "low must be under high")],
    ),
    "half a range": (
        space("pretrain.accumulation", {"low": 2}),
        [(f"{SPACE}.pretrain.accumulation.high", "is missing; add it")],
    ),
    "a range of halves": (
        space("pretrain.accumulation", {"low": 1, "high": 2.5}),
        [(f"{SPACE}.pretrain.accumulation", "whole numbers")],
    ),
    "a range without step in a grid": (
        space("pretrain.learning_rate", {"low": 0.1, "high": 0.2}),
        [(f"{SPACE}.pretrain.learning_rate", "'step'")],
    ),
    "a condition on a later setting": (
        put(
            "search/space",
            {
                "pretrain.accumulation": {"choices": [1], "when": {"pretrain.objective": "mlm"}},
                "pretrain.objective": ["mlm", "none"],
            },
        ),
        [(f"{SPACE}.pretrain.accumulation.when", "must stand before it")],
    ),
    "a condition that is never met": (
        put(
            "search/space",
            {
                "pretrain.objective": ["mlm", "none"],
                "pretrain.accumulation": {"choices": [1], "when": {"pretrain.objective": "declutr"}},
            },
        ),
        [(f"{SPACE}.pretrain.accumulation.when", "use one of ['mlm', 'none']")],
    ),
    "a condition on what is fixed": (
        space("pretrain.accumulation", {"choices": [1, 2], "when": {"pretrain.objective": "declutr"}}),
        [(f"{SPACE}.pretrain.accumulation.when", "it is always 'mlm' here: search it too")],
    ),
    "a condition outside a range": (
        put(
            "search/space",
            {
                "pretrain.batch_tokens": {"low": 512, "high": 513},
                "pretrain.accumulation": {"choices": [1], "when": {"pretrain.batch_tokens": 600}},
            },
        ),
        [(f"{SPACE}.pretrain.accumulation.when", "use a number from 512 to 513")],
    ),
    "a condition on nothing": (
        space("pretrain.accumulation", {"choices": [1], "when": {"pretrain.objectiv": "mlm"}}),
        [(f"{SPACE}.pretrain.accumulation.when", "did you mean 'pretrain.objective'?")],
    ),
    "a space file that is not there": (put("search/space", "gone.yaml"), [(SPACE, "correct the path")]),
    **{
        f"a {design} with {key}": (
            put("search", {"design": design, "space": {"pretrain.weight_decay": [0.0]}, key: value}),
            [("search", f"'{key}' is for random, tpe and nsga2: design '{design}' runs all its arms")],
        )
        for design in ("grid", "one_factor", "leave_one_out", "factorial")
        for key, value in (("num_arms", 3), ("confirm", {}), ("early_stopping", "successive_halving"))
    },
    "early stopping with two targets": (
        put(
            "search",
            TPE
            | {
                "targets": [{"task": "kind"}, {"task": "kind", "metric": "accuracy"}],
                "early_stopping": "successive_halving",
            },
        ),
        [("search", "'early_stopping' needs exactly one target; set it to none")],
    ),
    "a target twice": (
        put("search", TPE | {"targets": [{"task": "kind"}, {"task": "kind", "shots": 2, "mode": "min"}]}),
        [("search.targets.1", "is the same value as target 0; remove one")],
    ),
    "one_factor without space": (put("search/design", "one_factor"), [("search", "needs 'space'; add it")]),
    "a factor that the base arm does not read": (
        put(
            "search",
            {"design": "one_factor", "space": {"pretrain.objective": ["declutr"], "pretrain.declutr.max_span": [8]}},
        ),
        [(f"{SPACE}.pretrain.declutr.max_span", "change the base so that it does, remove the setting, or use grid")],
    ),
    "a component with two values": (
        space("pretrain.weight_decay", [0.0, 0.2], design="leave_one_out"),
        [(f"{SPACE}.pretrain.weight_decay", "list only that")],
    ),
    "a component as the base has it": (
        space("pretrain.weight_decay", [0.1], design="leave_one_out"),
        [(f"{SPACE}.pretrain.weight_decay", "0.1 is the base arm's own value")],
    ),
    "a factorial with a condition": (
        space("pretrain.weight_decay", {"choices": [0], "when": {"pretrain.objective": "mlm"}}, design="factorial"),
        [(f"{SPACE}.pretrain.weight_decay", "remove its 'when', or use grid")],
    ),
    "a factorial that is not full": (
        put(
            "search",
            {"design": "factorial", "space": {"pretrain.objective": ["none"], "pretrain.weight_decay": [0.0]}},
        ),
        [(f"{SPACE}.pretrain.weight_decay", "is not read where pretrain.objective is 'none'")],
    ),
    "a factorial of a range": (
        space("pretrain.weight_decay", {"low": 0.0, "high": 0.1}, design="factorial"),
        [(f"{SPACE}.pretrain.weight_decay", "design factorial needs 'choices', or a range with a 'step'")],
    ),
    "a design that is not there": (put("search/design", "factorail"), [("search.design", "did you mean 'factorial'?")]),
    "tpe without targets": (put("search", TPE | {"targets": []}), [("search", "needs 'targets'")]),
    "tpe without num_arms": (put("search", TPE | {"num_arms": None}), [("search", "needs 'num_arms'")]),
    "tpe without space": (put("search", TPE | {"space": {}}), [("search", "needs 'space'")]),
    "confirm seeds that are not fresh": (
        put("search", TPE | {"confirm": {"seeds": [0, 1]}}),
        [("search", "confirm.seeds must be fresh")],
    ),
    "seeds twice": (put("search/seeds", [1, 1]), [("search", "'seeds' names a seed twice")]),
    # base
    "a base that leads back": (put("base", "job.yaml"), [("base", "remove one 'base'")]),
    "a base that is not there": (put("base", "gone.yaml"), [("base", "correct the path")]),
    "a base that is a list": (put("base", ["a.yaml"]), [("base", "the path of one job file")]),
    # several at once
    "several mistakes": (
        both(
            put("name", ""),
            put("corpus/max_lenght", 3),
            put("pretrain/rungs", 0),
            put("evaluate/draws", "x"),
            put("search/num_arms", 2),
        ),
        [
            ("name", "pattern"),
            ("corpus.max_lenght", "max_length"),
            ("pretrain.rungs", "greater than or equal to 1"),
            ("evaluate.draws", "valid integer"),
            ("search", "'num_arms'"),
        ],
    ),
    "several rules broken": (
        both(
            put("pretrain/batch_tokens", 16),
            put("evaluate/tasks", ["x"]),
            put("pretrain/declutr", {"max_span": 40}),
            put("evaluate/retrieval/span", 99),
        ),
        [
            ("evaluate.tasks", "kind"),
            ("pretrain.declutr", "remove"),
            ("evaluate.retrieval.span", "30"),
            ("pretrain.batch_tokens", "32"),
        ],
    ),
    "several wrong columns": (
        both(put("corpus/documents/text", "txt"), put("corpus/tasks/kind/group", "patent")),
        [("corpus.documents.text", "'text'"), ("corpus.tasks.kind.group", "'patient'")],
    ),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a good job and its files."""
    rows = make_rows()
    pq.write_table(pa.table(rows), tmp_path / "notes.parquet")
    pq.write_table(pa.table(rows).slice(0, 0), tmp_path / "empty.parquet")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "latin.csv").write_bytes(f"text,patient\n{MARKER} caf\xe9,p1\n".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(make_job()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Answer:
    """What a command left: its exit code, its output and its messages."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        self.code = exit_.value.code
        self.out, self.err = capfd.readouterr()
        self.lines = self.err.splitlines()


def check_refused(answer: Answer, expected: list[tuple[str, str]]) -> None:
    """Exit code 2 and one line a mistake: `raylab: KEY: ... FIX`."""
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert MARKER not in answer.err
    assert "Traceback" not in answer.err
    assert len(answer.lines) == len(expected), answer.err
    for key, fix in expected:
        start = f"raylab: {key}: " if key else "raylab: "
        assert [line for line in answer.lines if line.startswith(start) and fix in line], (start, fix, answer.err)


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", BAD)
def test_wrong_job_is_refused(folder: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    change, expected = BAD[name]
    job = make_job()
    change(job)
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    before = list_files(folder)
    check_refused(Answer(capfd, "run", "job.yaml", "--results", "out", "--here"), expected)
    assert list_files(folder) == before


FILES: dict[str, tuple[bytes, str, str]] = {
    "not YAML": (b"name: [1\n", "job.yaml: line 2 is not YAML", "check indents and quotes"),
    "a tab": (b"name:\n\tx: 1\n", "job.yaml: line 2 is not YAML", "check indents and quotes"),
    "a list": (b"- name\n", "job.yaml", "must be a mapping of keys to values, not list"),
    "nothing": (b"", "job.yaml", "must be a mapping"),
    "key twice": (b"name: a\nname: b\n", "job.yaml: line 2", "keep one"),
    "not UTF-8": (b"name: caf\xe9\n", "job.yaml", "save it as UTF-8"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_file_is_refused(folder: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    content, start, fix = FILES[name]
    (folder / "job.yaml").write_bytes(content)
    answer = Answer(capfd, "run", "job.yaml", "--results", "out")
    assert answer.code == 2
    [line] = answer.lines
    assert line.startswith(f"raylab: {start}")
    assert fix in line
    assert not (folder / "out").exists()


RUN = ("run", "job.yaml", "--results", "out", "--here")
COMMANDS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "unknown command": (("rnu", "job.yaml"), ["No such command 'rnu'"]),
    "no job": (("run",), ["Missing argument 'job'"]),
    "wrong option": ((*RUN, "--reslts", "x"), ["No such option: --reslts"]),
    "wrong format": (("status", "--format", "xml"), ["'xml' is not one of 'table', 'json'"]),
    "job not there": (("run", "gone.yaml"), ["gone.yaml: No such file or directory; check the path"]),
    "job a folder": (("run", "empty"), ["empty: Is a directory; check the path"]),
    "set without value": ((*RUN, "--set", "name"), ["--set name: must be SETTING=VALUE"]),
    "set with an empty part": ((*RUN, "--set", "a..b=1"), ["--set a..b=1: must be SETTING=VALUE"]),
    "set no YAML": ((*RUN, "--set", "name=[1"), ["--set name=[1: the value is not YAML"]),
    "set twice wrong": ((*RUN, "--set", "name", "--set", "a=}"), ["--set name", "--set a=}"]),
    "set an unknown key": ((*RUN, "--set", "pretrain.rung=2"), ["pretrain.rung: unknown key; did you mean 'rungs'?"]),
    "set a wrong value": (
        (*RUN, "--set", "pretrain.rungs=x"),
        ['pretrain.rungs: must be a valid integer (is "x")'],
    ),
    "set an unread block": (
        (*RUN, "--set", "pretrain.declutr.max_span=40"),
        ["pretrain.declutr: objective mlm does not read it; remove the block"],
    ),
    "set below a value": ((*RUN, "--set", "name.x=1"), ["name: must be a valid string"]),
    "set a small number": ((*RUN, "--set", "pretrain.learning_rate=-5e-5"), ["greater than 0 (is -5e-05)"]),
    "data without the file": (
        (*RUN, "--data", "empty"),
        ["corpus.documents.path: ", "corpus.tasks.kind.path: "],
    ),
    "results a file": (("run", "job.yaml", "--results", "empty.csv", "--here"), ["empty.csv: ", "folder"]),
    "resume of nothing": (("resume", "x", "--results", "empty"), ["no job 'x' under empty; jobs there: none"]),
    "status of nothing": (("status", "--results", "gone"), ["--results gone: no such folder"]),
    "status of no job": (("status", "x", "--results", "empty"), ["no job 'x' under empty"]),
    "query without SQL": (("query", "--results", "empty"), ["query: give SQL in quotes, or --list"]),
    "query of bad SQL": (("query", "selec 1", "--results", "empty"), ["query: Parser Error"]),
    "query of no table": (("query", "select * from trails", "--results", "empty"), ["raylab query --list"]),
    "query in no folder": (("query", "select 1", "--results", "gone"), ["--results gone: no such folder"]),
    "optuna of no job": (("optuna", "x", "--results", "empty"), ["no job 'x' under empty"]),
    "tensorboard of no job": (("tensorboard", "x", "--results", "empty"), ["no job 'x' under empty"]),
    "synth of no notes": (("synth", "out", "--notes", "0"), ["num_notes is 0: it must be at least 1"]),
    "synth all wrong": (
        ("synth", "out", "--seed", "-1", "--label-noise", "1", "--max-words", "2"),
        ["seed is -1", "label_noise is 1.0", "max_words is 2"],
    ),
    "synth into a file": (("synth", "empty.csv"), ["empty.csv: File exists; choose a folder"]),
    "synth of words": (("synth", "out", "--notes", "many"), ["'--notes': Input should be a valid integer"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_command_is_refused(folder: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    arguments, expected = COMMANDS[name]
    before = list_files(folder)
    answer = Answer(capfd, *arguments)
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert MARKER not in answer.err
    assert "Traceback" not in answer.err
    assert all(line.startswith("raylab: ") for line in answer.lines)
    assert all(any(fragment in line for line in answer.lines) for fragment in expected), answer.err
    assert len(answer.lines) <= len(expected), answer.err
    assert list_files(folder) == before


@pytest.mark.parametrize("arguments", [["run", "gone.yaml"], ["nonsense"]])
def test_wrong_request_in_a_process_of_its_own(folder: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "raylab.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_debug_gives_the_traceback(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.yaml"):
        main(["run", "gone.yaml", "--debug"])


def test_unforeseen_error_is_one_line_without_its_message(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"the row says {MARKER}")

    monkeypatch.setattr("raylab.job.jobs.load_job", fail)
    answer = Answer(capfd, "run", "job.yaml")
    assert answer.code == 1
    [line] = answer.lines
    assert "RuntimeError" in line
    assert MARKER not in line


def test_schema_names_every_key(capfd: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capfd, "schema")
    assert answer.code == 0
    assert list(json.loads(answer.out)["properties"]) == list(Job.model_fields)


def test_query_lists_the_tables_without_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capfd, "query", "--list", "--format", "json", "--results", "gone")
    assert answer.code == 0
    rows = json.loads(answer.out)
    assert {"table": "trials", "column": "pretrain.declutr.max_span", "type": "int64", "about": None} in rows
    assert {"table": "arms", "column": "seeds", "type": "int64", "about": None} in rows
    about = {row["table"]: row["about"] for row in reversed(rows)}
    assert about.keys() == {
        "trials", "scores", "confusions", "geometry", "curves", "stages", "hygiene", "unseals",
        "seeds", "arms", "best", "effects", "cost",
    }  # fmt: skip
    assert all(about.values())


def test_status_of_an_empty_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capfd, "status", "--results", "empty", "--format", "json")
    assert (answer.code, json.loads(answer.out)) == (0, [])
    assert "no jobs under empty" in Answer(capfd, "status", "--results", "empty").err


def test_query_answers(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capfd, "query", "select 1 as one", "--results", "empty", "--format", "json")
    assert (answer.code, json.loads(answer.out)) == (0, [{"one": 1}])
