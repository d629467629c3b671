"""Job files: base, numbers, paths and overrides; which settings are read; what makes an arm."""

import ast
import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raylab.base.identity import name_arm
from raylab.base.mistakes import JobError
from raylab.job.jobs import check_job, dump_yaml, load_job, merge, read_value, read_yaml
from raylab.job.settings import (
    SCORE_METRICS,
    SETTINGS,
    list_parameters,
    list_settings,
    resolve_target,
    with_settings,
)
from raylab.measures import geometry, scores
from raylab.measures.definitions import DEFINITIONS

ROOT = Path(__file__).parent.parent
JOBS, SPACES = sorted((ROOT / "jobs").rglob("*.y*ml")), sorted((ROOT / "search_spaces").rglob("*.y*ml"))
GOOD: dict[str, Any] = {
    "name": "good",
    "corpus": {
        "documents": {"path": "/data/notes.parquet", "text": "text"},
        "tasks": {"kind": {"path": "/data/notes.parquet", "text": "text", "label": "kind"}},
        "max_length": 64,
    },
    "encoder": {"config": {"hidden_size": 16, "num_attention_heads": 2}, "tokenizer": {"vocab_size": 300}},
    "pretrain": {"num_tokens": 100_000, "batch_tokens": 4096},
}


def vary(**changes: Any) -> dict[str, Any]:
    """GOOD with blocks changed as a variant would change them."""
    return merge(copy.deepcopy(GOOD), changes)


def write(path: Path, content: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_merge_joins_mappings_replaces_lists_and_deletes_by_null() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1, "e": {"f": 1}}
    variant = {"a": {"c": [3], "g": None}, "d": None, "e": 5, "new": {"h": None, "i": 1}}
    assert merge(base, variant) == {"a": {"b": 1, "c": [3]}, "e": 5, "new": {"i": 1}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1, "e": {"f": 1}}


def test_chain_of_bases(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", vary(evaluate={"shots": [4, 8]}))
    write(tmp_path / "deep" / "b.yaml", "base: ../a.yaml\nname: b\npretrain: {mlm: {mask_fraction: 0.3}}\n")
    path = write(tmp_path / "c.yaml", "base: deep/b.yaml\npretrain: {num_tokens: null}\nevaluate: {shots: [full]}\n")
    job = load_job(path)
    assert job.name == "b"
    assert job.pretrain.mlm.mask_fraction == 0.3
    assert job.pretrain.num_tokens == 1_000_000  # the default
    assert job.pretrain.batch_tokens == 4096
    assert job.evaluate.shots == ("full",)


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "a"]])
def test_loop_of_bases_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name, base in itertools.pairwise(names):
        write(tmp_path / f"{name}.yaml", f"base: {base}.yaml\n")
    with pytest.raises(JobError, match=r"base: .*a\.yaml leads back to itself; remove"):
        load_job(tmp_path / "a.yaml")


def test_paths_start_at_the_file_that_wrote_them(tmp_path: Path) -> None:
    (tmp_path / "far" / "encoder").mkdir(parents=True)
    write(tmp_path / "far" / "space.yaml", "encoder.pretrained: [encoder, roberta-base, ./gone]\n")
    base = vary(encoder={"config": None, "tokenizer": None, "pretrained": "encoder"}, search={"space": "space.yaml"})
    base["corpus"]["tasks"]["kind"] = {"sql": "select * from 'n.csv'", "text": "text", "label": "kind"}
    base["corpus"]["tasks"]["rooted"] = {"sql": "select 1", "root": "sub", "text": "text", "label": "kind"}
    base["corpus"]["tasks"]["s3"] = {"path": "s3://bucket/x.parquet", "text": "text", "label": "kind"}
    base["corpus"]["documents"]["path"] = "notes.parquet"
    write(tmp_path / "far" / "base.yaml", base)
    tasks = {"near": {"path": "near.csv", "text": "text", "label": "kind"}, "rooted": {"root": "other"}}
    path = write(tmp_path / "near" / "job.yaml", {"base": "../far/base.yaml", "corpus": {"tasks": tasks}})
    job = load_job(path)
    far, near = tmp_path / "far", tmp_path / "near"
    assert job.corpus.documents.path == str(far / "notes.parquet")
    assert job.corpus.tasks["kind"].root == str(far)
    assert job.corpus.tasks["rooted"].root == str(near / "other")
    assert job.corpus.tasks["s3"].path == "s3://bucket/x.parquet"
    assert job.corpus.tasks["near"].path == str(near / "near.csv")
    assert job.encoder.pretrained == str(far / "encoder")
    entry = job.search.space["encoder.pretrained"]
    assert entry.model_dump()["choices"] == (str(far / "encoder"), "roberta-base", str(far / "gone"))


def test_variant_space_replaces_the_base_space(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", vary(search={"space": {"pretrain.rungs": [1]}}))
    write(tmp_path / "spaces" / "s.yaml", "pretrain.learning_rate: [1e-4, 5e-5]\n")
    path = write(tmp_path / "job.yaml", "base: base.yaml\nsearch: {space: spaces/s.yaml}\n")
    assert list(load_job(path).search.space) == ["pretrain.learning_rate"]
    added = load_job(path, overrides={"search.space.pretrain.weight_decay": [0.1, 0.2]})
    assert list(added.search.space) == ["pretrain.learning_rate", "pretrain.weight_decay"]


def test_variant_may_turn_a_query_into_a_file(tmp_path: Path) -> None:
    base = vary()
    base["corpus"]["documents"] = {"sql": "select 1", "text": "text"}
    write(tmp_path / "base.yaml", base)
    path = write(tmp_path / "job.yaml", "base: base.yaml\ncorpus: {documents: {sql: null, path: n.csv}}\n")
    documents = load_job(path).corpus.documents
    assert (documents.path, documents.sql, documents.root) == (str(tmp_path / "n.csv"), None, None)


def test_data_folder_moves_corpus_files_by_name(tmp_path: Path) -> None:
    raw = vary()
    raw["corpus"]["documents"]["path"] = "/elsewhere/notes.parquet"
    raw["corpus"]["tasks"]["asked"] = {"sql": "select 1", "text": "text", "label": "kind"}
    write(tmp_path / "base.yaml", raw)
    path = write(tmp_path / "job.yaml", "base: base.yaml\n")
    job = load_job(path, data=tmp_path / "data", overrides={"corpus.tasks.kind.path": "x/other.parquet"})
    assert job.corpus.documents.path == str(tmp_path / "data" / "notes.parquet")
    assert job.corpus.tasks["kind"].path == str(tmp_path / "data" / "other.parquet")
    assert job.corpus.tasks["asked"].root == str(tmp_path / "data")


def test_overrides_replace_delete_and_resolve_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "deep" / "job.yaml", GOOD)
    overrides = {"pretrain.mlm.weight": 2, "pretrain.batch_tokens": None, "corpus.documents.path": "here.csv"}
    job = load_job(path, overrides=overrides)
    assert job.pretrain.mlm.weight == 2
    assert job.pretrain.batch_tokens == 8192
    assert job.corpus.documents.path == str(tmp_path / "here.csv")
    with pytest.raises(JobError, match=r"pretrain\.declutr: objective mlm does not read it"):
        load_job(path, overrides={"pretrain.declutr.max_span": 40})


def test_override_of_the_objective_makes_the_file_a_base(tmp_path: Path) -> None:
    declutr = {"objective": "declutr", "declutr": {"max_span": 16, "min_span": 8}}
    path = write(tmp_path / "job.yaml", vary(pretrain=declutr))
    assert load_job(path, overrides={"pretrain.objective": "mlm"}).pretrain.objective == "mlm"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("2e6", 2_000_000),
        ("1.5e3", 1500.0),
        ("-1e-3", -1e-3),
        ("20_000_000", 20_000_000),
        ("0.1", 0.1),
        ("'5e-5'", "5e-5"),
        ("e5", "e5"),
        ("null", None),
        ("[8, full]", [8, "full"]),
    ],
)
def test_numbers(text: str, value: Any) -> None:
    found = read_value(text)
    assert found == value
    assert type(found) is type(value)


def test_yaml_merge_keys_and_anchors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "one: &one {a: 1, b: 2}\ntwo: {<<: *one, b: 3}\n")
    assert read_yaml(path)["two"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "line 2: key 'c' stands twice; keep one"),
        ("a: [1\n", "line 2 is not YAML"),
        ("a: \x00\n", "is not YAML"),
        ("- a\n", "must be a mapping of keys to values, not list"),
        ("", "must be a mapping of keys to values, not NoneType"),
        ("? [a]\n: 1\n", "line 1: a key must be a name"),
        ("2024-01-01: 1\n", "line 1: a key must be a name"),
    ],
)
def test_unreadable_yaml_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(JobError) as caught:
        read_yaml(write(tmp_path / "a.yaml", text))
    [line] = caught.value.problems
    assert problem in line
    assert "\n" not in line


def test_yaml_that_holds_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds itself"):
        load_job(write(tmp_path / "a.yaml", "name: a\ncorpus: &c {documents: *c}\n"))


def test_unread_block_is_allowed_inherited_and_refused_written(tmp_path: Path) -> None:
    declutr = {"objective": "declutr", "declutr": {"max_span": 16, "min_span": 8}}
    write(tmp_path / "base.yaml", vary(pretrain=declutr))
    assert load_job(write(tmp_path / "a.yaml", "base: base.yaml\npretrain: {objective: mlm}\n"))
    assert load_job(write(tmp_path / "b.yaml", "base: base.yaml\npretrain: {objective: mlm, declutr: null}\n"))
    written = "base: base.yaml\npretrain: {objective: mlm, declutr: {max_span: 8}}\n"
    with pytest.raises(JobError, match=r"^pretrain\.declutr: objective mlm does not read it; remove the block$"):
        load_job(write(tmp_path / "c.yaml", written))


METADATA = {"objective": "metadata", "metadata": {"field": "source"}}
DECLUTR = {"objective": "declutr", "declutr": {"max_span": 16, "min_span": 8}}
SUPERVISED = {"objective": "metadata", "metadata": {"field": "source", "loss": "supervised_contrastive"}}
PRETRAINED = {"config": None, "tokenizer": None, "pretrained": "someone/model", "revision": "12e4"}
VARIANTS: dict[str, dict[str, Any]] = {
    "mlm": {},
    "none": {"pretrain": {"objective": "none", "num_tokens": None, "batch_tokens": None}},
    "declutr": {"pretrain": DECLUTR},
    "metadata": {"pretrain": METADATA},
    "supervised": {"pretrain": SUPERVISED},
    "column": {"corpus": {"split": {"column": "part", "values": {"train": ["a", "b"], "validation": ["c"]}}}},
    "fractions": {"corpus": {"split": {"train": 0.5, "validation": 0.25, "test": 0.25, "vary": True}}},
    "pretrained": {"encoder": PRETRAINED},
    "trial": {"encoder": {"config": None, "tokenizer": None, "trial": "0123456789e4-0"}},
    "geometry": {
        "search": {"targets": [{"table": "geometry", "task": "kind", "metric": "uniformity", "mode": "min"}]},
    },
    "tpe": {
        "search": {
            "space": {
                "pretrain.objective": ["mlm", "declutr"],
                "pretrain.declutr.max_span": {"choices": [16, 32], "when": {"pretrain.objective": "declutr"}},
                "pretrain.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
                "evaluate.frozen_layers": ["all", "2"],
            },
            "design": "tpe",
            "num_arms": 4,
            "targets": [{"task": "kind"}],
            "confirm": {"top": 1, "seeds": [4]},
        },
        "pretrain": {"declutr": {"min_span": 8}},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_dump_reads_back_as_the_same_job(tmp_path: Path, name: str) -> None:
    job = check_job(vary(**VARIANTS[name]))
    again = load_job(write(tmp_path / "job.yaml", dump_yaml(job)))
    assert again == job
    assert list_settings(again) == list_settings(job)
    assert dump_yaml(again) == dump_yaml(job)


def test_dump_of_a_job_with_an_inherited_unread_block_reads_back(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", vary(pretrain=SUPERVISED | {"declutr": {"max_span": 40}}) | {"name": "a"})
    job = load_job(write(tmp_path / "job.yaml", "base: base.yaml\npretrain: {objective: mlm}\n"))
    again = load_job(write(tmp_path / "kept.yaml", dump_yaml(job)))
    assert list_settings(again) == list_settings(job)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_parses_and_reads_back(tmp_path: Path, path: Path) -> None:
    job = load_job(path)
    assert list_settings(load_job(write(tmp_path / "job.yaml", dump_yaml(job)))) == list_settings(job)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_every_search_space_parses(path: Path) -> None:
    search = {"space": read_yaml(path), "design": "random", "num_arms": 2, "targets": [{"task": "kind"}]}
    roomy = {"max_length": 512, "documents": {"group": None}}
    pretrain = {"batch_tokens": 65_536, "num_tokens": 10_000_000, "metadata": {"field": "source"}}
    job = check_job(vary(corpus=roomy, pretrain=pretrain, search=search))
    assert list(job.search.space) == list(read_yaml(path))


def test_metrics_named_in_settings_are_those_measured() -> None:
    assert SCORE_METRICS == scores.METRICS


@pytest.mark.parametrize("metric", DEFINITIONS)
def test_a_geometry_target_without_a_parameter_is_what_is_measured(metric: str) -> None:
    target = {"table": "geometry", "task": "kind", "metric": metric}
    asked = {"thresholds": [0.3, 0.6], "densities": [0.2], "neighbours": [2, 3]}
    job = check_job(vary(search={"targets": [target]}, evaluate={"geometry": asked}))
    settings = job.evaluate.geometry
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    options = geometry.Options(settings.thresholds, settings.densities, settings.neighbours)
    rows = geometry.measure_geometry(x, np.arange(20) % 2, options=options, max_points=20, graph_points=20, seed=0)
    measured = tuple(row.parameter for row in rows if row.metric == metric)
    assert list_parameters(job, metric) == measured
    assert resolve_target(job, job.search.targets[0])["parameter"] == measured[0]
    direction = DEFINITIONS[metric].direction
    assert job.search.targets[0].mode == (direction if direction != "none" else "max")
    other = check_job(vary(search={"targets": [target | {"mode": "min"}]}, evaluate={"geometry": asked}))
    assert other.search.targets[0].mode == "min"


def test_a_geometry_target_that_is_measured_nowhere_is_refused() -> None:
    target = {"table": "geometry", "task": "kind", "metric": "knn_purity"}
    with pytest.raises(JobError) as caught:
        check_job(vary(search={"targets": [target]}, evaluate={"geometry": {"neighbours": []}}))
    assert "evaluate.geometry.neighbours is empty" in caught.value.problems[0]


def test_a_step_needs_room_for_its_largest_text_or_document_alone() -> None:
    spans = {"num_anchors": 2, "num_positives": 3, "max_span": 30, "min_span": 8}
    for objective, block, largest in (("mlm", {}, 64), ("declutr", {"declutr": spans}, 2 * (1 + 3) * (30 + 2))):
        pretrain = {"objective": objective, "accumulation": 8, "num_tokens": 100_000, **block}
        for tokens in (largest - 1, largest):
            raw = vary(
                corpus={"max_length": 64}, pretrain=pretrain | {"batch_tokens": tokens}, resources={"workers": 4},
                evaluate={"retrieval": {"span": 16}},
            )  # fmt: skip
            if tokens == largest:
                check_job(raw)
                continue
            with pytest.raises(JobError, match=rf"^pretrain\.batch_tokens: {tokens} must be {largest} or more"):
                check_job(raw)


def test_every_setting_is_read_outside_the_models() -> None:
    """By its attribute name or its whole dotted name; specs and settings don't count."""
    names: set[str] = set()
    for path in (ROOT / "raylab").rglob("*.py"):
        if path.name not in ("specs.py", "settings.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    names.add(node.attr)
                elif isinstance(node, ast.Constant) and node.value in SETTINGS:
                    names.add(node.value.split(".")[-1])
    names.add("test")  # of the split: what the other two leave, which Split itself checks
    assert [name for name in SETTINGS if name.split(".")[-1] not in names] == []


READ_BY = {
    "pretrain.mlm": {"mlm", "declutr", "metadata", "supervised"},
    "pretrain.declutr": {"declutr"},
    "pretrain.metadata.temperature": {"supervised"},
    "pretrain.metadata": {"metadata", "supervised"},
    "pretrain.objective": {"none", "mlm", "declutr", "metadata", "supervised"},
    "pretrain": {"mlm", "declutr", "metadata", "supervised"},
}


@pytest.mark.parametrize("name", ["none", "mlm", "declutr", "metadata", "supervised"])
def test_unread_settings_are_null(name: str) -> None:
    job = check_job(vary(**VARIANTS[name]))
    found = list_settings(job)
    assert list(found) == list(SETTINGS)
    nullable = {"pretrain.declutr.min_document_length"}
    for setting in SETTINGS:
        if setting.startswith("pretrain."):
            readers = next(v for k, v in READ_BY.items() if f"{setting}.".startswith(f"{k}."))
            assert (found[setting] is not None) == (name in readers) or setting in nullable, setting


def test_unread_parts_of_the_split_are_null() -> None:
    found = list_settings(check_job(vary(**VARIANTS["column"])))
    assert [found[f"corpus.split.{key}"] for key in ("train", "seed", "vary")] == [None] * 3
    assert found["corpus.split.column"] == "part"


# Every setting -> whether another value makes another arm, in a supervised-contrastive and in a DeCLUTR job that is not
# named there as unread. `data` and the encoder's weights count by their own digests.
CHANGES: dict[str, tuple[Any, bool]] = {
    "corpus.documents.path": ("other.csv", False),
    "corpus.documents.sql": ("select 1", False),
    "corpus.documents.root": ("/x", False),
    "corpus.documents.format": ("csv", False),
    "corpus.documents.text": ("t", False),
    "corpus.documents.id": ("i", False),
    "corpus.documents.group": ("g", False),
    "corpus.tasks": ({}, False),
    "corpus.split.train": (0.5, False),
    "corpus.split.validation": (0.3, False),
    "corpus.split.test": (0.3, False),
    "corpus.split.seed": (3, False),
    "corpus.split.vary": (True, False),
    "corpus.split.column": ("part", False),
    "corpus.split.values": ({}, False),
    "corpus.max_length": (48, True),
    "corpus.long_documents": ("windows", True),
    "encoder.pretrained": ("x", False),
    "encoder.revision": ("main", False),
    "encoder.trial": ("x-0", False),
    "encoder.config.hidden_size": (32, True),
    "encoder.config.num_hidden_layers": (2, True),
    "encoder.config.num_attention_heads": (4, True),
    "encoder.config.intermediate_size": (64, True),
    "encoder.config.dropout": (0.2, True),
    "encoder.tokenizer.vocab_size": (400, True),
    "pretrain.objective": ("mlm", True),
    "pretrain.num_tokens": (200_000, True),
    "pretrain.rungs": (2, False),
    "pretrain.batch_tokens": (8192, True),
    "pretrain.accumulation": (2, True),
    "pretrain.learning_rate": (1e-3, True),
    "pretrain.weight_decay": (0.2, True),
    "pretrain.warmup_fraction": (0.2, True),
    "pretrain.max_grad_norm": (2.0, True),
    "pretrain.precision": ("bfloat16", True),
    "pretrain.mlm.mask_fraction": (0.2, True),
    "pretrain.mlm.weight": (0.5, True),
    "pretrain.declutr.num_anchors": (2, True),
    "pretrain.declutr.num_positives": (1, True),
    "pretrain.declutr.max_span": (20, True),
    "pretrain.declutr.min_span": (4, True),
    "pretrain.declutr.sampling": ("adjacent", True),
    "pretrain.declutr.temperature": (0.1, True),
    "pretrain.declutr.min_document_length": (200, True),
    "pretrain.declutr.short_documents": ("shrink", True),
    "pretrain.declutr.weight": (0.5, True),
    "pretrain.metadata.field": ("ward", True),
    "pretrain.metadata.loss": ("cross_entropy", True),
    "pretrain.metadata.temperature": (0.5, True),
    "pretrain.metadata.weight": (0.5, True),
    "evaluate.tasks": (["kind"], False),
    "evaluate.shots": ([4], False),
    "evaluate.frozen_layers": (["none"], False),
    "evaluate.draws": (2, False),
    "evaluate.probes": (["mlp"], False),
    "evaluate.selection": ("cross_validation", True),
    "evaluate.precision": ("bfloat16", True),
    "evaluate.fine_tune.steps": (7, True),
    "evaluate.fine_tune.batch_size": (8, True),
    "evaluate.fine_tune.learning_rate": (1e-3, True),
    "evaluate.fine_tune.head_learning_rate": (1e-4, True),
    "evaluate.fine_tune.weight_decay": (0.2, True),
    "evaluate.fine_tune.hidden_size": (8, True),
    "evaluate.fine_tune.dropout": (0.3, True),
    "evaluate.fine_tune.class_weights": ("balanced", True),
    "evaluate.geometry.thresholds": ([0.1], False),
    "evaluate.geometry.densities": ([0.1], False),
    "evaluate.geometry.neighbours": ([3], False),
    "evaluate.geometry.max_points": (50, False),
    "evaluate.geometry.graph_points": (50, False),
    "evaluate.geometry.spans": (0, False),
    "evaluate.geometry.references": (False, False),
    "evaluate.geometry.subsamples": (5, False),
    "evaluate.retrieval.span": (8, False),
    "evaluate.retrieval.candidates": (8, False),
}


def arm_of(settings: dict[str, Any], **changes: Any) -> str:
    given: dict[str, Any] = {"data_digest": "d", "encoder_digest": "e"} | changes
    return name_arm(settings, **given)


def test_the_table_of_changes_names_every_setting() -> None:
    assert list(CHANGES) == list(SETTINGS)


@pytest.mark.parametrize("setting", CHANGES)
def test_which_settings_make_another_arm(setting: str) -> None:
    value, counts = CHANGES[setting]
    blocks = "declutr" if setting.startswith("pretrain.declutr.") else "supervised"
    settings = list_settings(check_job(vary(**VARIANTS[blocks])))
    assert settings[setting] != value
    assert (arm_of(settings | {setting: value}) != arm_of(settings)) == counts
    if setting.startswith("evaluate."):
        searched = [setting]
        assert arm_of(settings | {setting: value}, searched=searched) != arm_of(settings, searched=searched)


UNREAD = [
    ("none", "pretrain.learning_rate", 1e-3),
    ("none", "pretrain.mlm.mask_fraction", 0.4),
    ("mlm", "pretrain.declutr.max_span", 40),
    ("mlm", "pretrain.metadata.weight", 3.0),
    ("declutr", "pretrain.metadata.weight", 3.0),
    ("metadata", "pretrain.declutr.max_span", 40),
    ("metadata", "pretrain.metadata.temperature", 0.3),
]


@pytest.mark.parametrize(("name", "setting", "value"), UNREAD)
def test_settings_that_are_not_read_make_no_other_arm(name: str, setting: str, value: Any) -> None:
    job = check_job(vary(**VARIANTS[name]))
    assert arm_of(list_settings(with_settings(job, {setting: value}))) == arm_of(list_settings(job))


def test_name_resources_and_limits_make_no_other_arm_but_data_and_weights_do() -> None:
    settings = list_settings(check_job(vary()))
    other = vary(name="other", resources={"workers": 2}, limits={"hours": 1}, search={"seeds": [4, 5]})
    assert arm_of(list_settings(check_job(other))) == arm_of(settings)
    arms = {arm_of(settings), arm_of(settings, data_digest="x"), arm_of(settings, encoder_digest="x")}
    assert len(arms) == 3


def test_a_searched_start_takes_the_place_of_the_others() -> None:
    job = check_job(vary())
    assert with_settings(job, {"encoder.pretrained": "roberta-base"}).encoder.config is None
    assert with_settings(job, {"encoder.trial": "x-0"}).encoder.tokenizer is None
