"""What a change of a job reuses and what it makes anew: every setting, one by one."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from raylab.data.corpus import DOCUMENTS
from raylab.job.jobs import load_job
from raylab.job.settings import SETTINGS, list_settings
from raylab.results.queries import open_tables
from raylab.results.tables import plain_value, same_measures
from raylab.runs.plan import plan_job
from raylab.runs.preparation import make_spec, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job
from raylab.training.rungs import list_rungs

# What can be the same or another one.
WHAT = ("corpus", "tokenizer", "tokens", "start", "pretrain", "arm", "measures")
ALL = {*WHAT} - {"measures"}
NOTHING: set[str] = set()
TRAINING = {"pretrain", "arm"}
SPLIT = ALL
TEXT_CUT = {"start", "pretrain", "arm"}

# Setting -> (objective, its other value, what that makes another). Values that name files or columns are those of the
# `wide` notes: the same notes with columns beside.
CHANGES = {
    "corpus.documents.path": ("mlm", "other.parquet", ALL),
    "corpus.documents.sql": ("mlm", "select * from 'notes.parquet' where patient not like '%7'", ALL),
    "corpus.documents.root": ("sql", "elsewhere", NOTHING),
    "corpus.documents.format": ("mlm", "parquet", NOTHING),
    "corpus.documents.text": ("mlm", "other_text", ALL),
    "corpus.documents.id": ("mlm", "note_id", NOTHING),
    "corpus.documents.group": ("mlm", "other_patient", ALL),
    "corpus.tasks": ("mlm", "severity", {"corpus", "arm"}),
    "corpus.split.train": ("mlm", 0.5, SPLIT),
    # The tokenizer and the untrained encoder know the training rows alone.
    "corpus.split.validation": ("mlm", 0.35, SPLIT - {"tokenizer", "start"}),
    "corpus.split.test": ("mlm", 0.3, SPLIT - {"tokenizer", "start"}),
    "corpus.split.seed": ("mlm", 1, SPLIT),
    "corpus.split.vary": ("mlm", True, SPLIT),
    "corpus.split.column": ("mlm", "part", SPLIT),
    "corpus.split.values": ("column", {"train": ["train", "test"], "validation": ["validation"], "test": []}, SPLIT),
    "corpus.max_length": ("mlm", 48, TEXT_CUT),
    "corpus.long_documents": ("mlm", "windows", TRAINING),
    "encoder.pretrained": ("mlm", "roberta", {"tokenizer", "tokens", "start", "pretrain", "arm"}),
    "encoder.config.hidden_size": ("mlm", 24, TEXT_CUT),
    "encoder.config.num_hidden_layers": ("mlm", 1, TEXT_CUT),
    "encoder.config.num_attention_heads": ("mlm", 4, TEXT_CUT),
    "encoder.config.intermediate_size": ("mlm", 48, TEXT_CUT),
    "encoder.config.dropout": ("mlm", 0.2, TEXT_CUT),
    "encoder.tokenizer.vocab_size": ("mlm", 350, {"tokenizer", "tokens", "start", "pretrain", "arm"}),
    "pretrain.objective": ("mlm", "declutr", TRAINING),
    "pretrain.num_tokens": ("mlm", 13_000, TRAINING),
    "pretrain.rungs": ("mlm", 3, {"measures"}),
    "pretrain.batch_tokens": ("mlm", 1500, TRAINING),
    "pretrain.accumulation": ("mlm", 2, TRAINING),
    "pretrain.learning_rate": ("mlm", 2e-3, TRAINING),
    "pretrain.weight_decay": ("mlm", 0.2, TRAINING),
    "pretrain.warmup_fraction": ("mlm", 0.2, TRAINING),
    "pretrain.max_grad_norm": ("mlm", 2.0, TRAINING),
    "pretrain.precision": ("mlm", "bfloat16", TRAINING),
    "pretrain.mlm.mask_fraction": ("mlm", 0.3, TRAINING),
    "pretrain.mlm.weight": ("declutr", 0.5, TRAINING),
    "pretrain.declutr.num_anchors": ("declutr", 1, TRAINING),
    "pretrain.declutr.num_positives": ("declutr", 1, TRAINING),
    "pretrain.declutr.max_span": ("declutr", 20, TRAINING),
    "pretrain.declutr.min_span": ("declutr", 10, TRAINING),
    "pretrain.declutr.sampling": ("declutr", "adjacent", TRAINING),
    "pretrain.declutr.temperature": ("declutr", 0.1, TRAINING),
    "pretrain.declutr.min_document_length": ("declutr", 120, TRAINING),
    "pretrain.declutr.short_documents": ("declutr", "shrink", TRAINING),
    "pretrain.declutr.weight": ("declutr", 0.5, TRAINING),
    "pretrain.metadata.field": ("supervised_contrastive", "severity", {"corpus", *TRAINING}),
    "pretrain.metadata.loss": ("supervised_contrastive", "cross_entropy", TRAINING),
    "pretrain.metadata.temperature": ("supervised_contrastive", 0.2, TRAINING),
    "pretrain.metadata.weight": ("supervised_contrastive", 0.5, TRAINING),
    "evaluate.tasks": ("mlm", ["condition"], {"measures"}),
    "evaluate.shots": ("mlm", [2, 4], {"measures"}),
    "evaluate.frozen_layers": ("mlm", ["all", "1"], {"measures"}),
    "evaluate.draws": ("mlm", 3, {"measures"}),
    "evaluate.probes": ("mlm", ["mlp"], {"measures"}),
    "evaluate.selection": ("mlm", "cross_validation", {"arm", "measures"}),
    "evaluate.precision": ("mlm", "bfloat16", {"arm", "measures"}),
    "evaluate.fine_tune.steps": ("mlm", 7, {"arm", "measures"}),
    "evaluate.fine_tune.batch_size": ("mlm", 8, {"arm", "measures"}),
    "evaluate.fine_tune.learning_rate": ("mlm", 2e-4, {"arm", "measures"}),
    "evaluate.fine_tune.head_learning_rate": ("mlm", 1e-2, {"arm", "measures"}),
    "evaluate.fine_tune.weight_decay": ("mlm", 0.1, {"arm", "measures"}),
    "evaluate.fine_tune.hidden_size": ("mlm", 64, {"arm", "measures"}),
    "evaluate.fine_tune.dropout": ("mlm", 0.3, {"arm", "measures"}),
    "evaluate.fine_tune.class_weights": ("mlm", "balanced", {"arm", "measures"}),
    "evaluate.geometry.thresholds": ("mlm", [0.6], {"measures"}),
    "evaluate.geometry.densities": ("mlm", [0.1], {"measures"}),
    "evaluate.geometry.neighbours": ("mlm", [3], {"measures"}),
    "evaluate.geometry.max_points": ("mlm", 90, {"measures"}),
    "evaluate.geometry.graph_points": ("mlm", 40, {"measures"}),
    "evaluate.geometry.spans": ("mlm", 9, {"measures"}),
    "evaluate.geometry.references": ("mlm", False, {"measures"}),
    "evaluate.geometry.subsamples": ("mlm", 5, {"measures"}),
    "evaluate.retrieval.span": ("mlm", 12, {"measures"}),
    "evaluate.retrieval.candidates": ("mlm", 9, {"measures"}),
}
# Settings that only choose among the others' forms.
BY_OTHERS = {"encoder.revision", "encoder.trial"}


@pytest.fixture(scope="module")
def wide(notes, tmp_path_factory):
    """A folder with the notes and columns beside; the same without one note; and a copy of the whole elsewhere."""
    folder = tmp_path_factory.mktemp("wide")
    table = pq.read_table(notes / "notes.parquet")
    patients = sorted(set(table["patient"].to_pylist()))
    parts = {patient: ("train", "train", "validation", "test")[index % 4] for index, patient in enumerate(patients)}
    table = table.append_column("other_text", pa.array([f"once {text}" for text in table["text"].to_pylist()]))
    table = table.append_column("other_patient", pa.array([f"p{row // 2}" for row in range(len(table))]))
    table = table.append_column("part", pa.array([parts[patient] for patient in table["patient"].to_pylist()]))
    pq.write_table(table, folder / "notes.parquet")
    pq.write_table(table.slice(1), folder / "other.parquet")
    (folder / "elsewhere").mkdir()
    shutil.copy(folder / "notes.parquet", folder / "elsewhere")
    return folder


@pytest.fixture(scope="module")
def make_wide(make_job, wide, encoder_folders):
    """`make_wide(objective, changes)`: the tiny job on the wide notes; the encoder's family stands for its folder."""

    def make(objective, changes):
        path = str(wide / "notes.parquet")
        start = {
            "corpus.documents": {"path": path},
            "corpus.tasks": {task: {"path": path} for task in ("condition", "severity")},
        }
        if objective == "sql":
            query = "select * from 'notes.parquet'"
            start["corpus.documents"] = {"path": None, "sql": query, "root": str(wide), "id": "note_id"}
        if objective == "column":
            start["corpus.split"] = {"train": None, "validation": None, "test": None, "column": "part"}
        for name, value in changes.items():
            match name:
                case "corpus.documents.path":
                    start[name] = str(wide / value)
                case "corpus.documents.sql":
                    start["corpus.documents"] = {"path": None, "sql": value, "root": str(wide), "id": "note_id"}
                case "corpus.documents.root":
                    start["corpus.documents"] |= {"root": str(wide / value)}
                case "corpus.tasks":
                    start["corpus.tasks"] = {"condition": None, value: {"path": path}}
                case "corpus.split.train":
                    start[name], start["corpus.split.test"] = value, 0.3
                case "corpus.split.validation":
                    start[name], start["corpus.split.test"] = value, 0.05
                case "corpus.split.test":
                    start[name], start["corpus.split.validation"] = value, 0.1
                case "corpus.split.column":
                    start["corpus.split"] = {"train": None, "validation": None, "test": None, "column": value}
                case "encoder.pretrained":
                    start["encoder"] = {"config": None, "tokenizer": None, "pretrained": str(encoder_folders[value])}
                case _:
                    start[name] = value
        kind = objective if objective in ("declutr", "supervised_contrastive") else "mlm"
        if changes.get("pretrain.objective") == "declutr":
            kind, _ = "declutr", start.pop("pretrain.objective")
        return make_job(kind, start)

    return make


def identify(job, results):
    spec = make_spec(prepare(job, results), {}, 0, "fixed")
    rungs = list_rungs(spec)
    ids = (spec.corpus, spec.tokenizer, spec.tokens[DOCUMENTS], rungs[0].stage_id, rungs[-1].stage_id, spec.arm)
    return dict(zip(WHAT, ids, strict=False)), {k: plain_value(v) for k, v in list_settings(spec.settings).items()}


def test_every_setting_is_in_the_table():
    assert CHANGES.keys() | BY_OTHERS == SETTINGS.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_makes_anew_what_it_matters_to_and_nothing_else(name, make_wide, results):
    objective, value, expected = CHANGES[name]
    base, changed = make_wide(objective, {}), make_wide(objective, {name: value})
    assert base != changed
    before, row = identify(base, results)
    after, settings = identify(changed, results)
    other = {what for what in before if before[what] != after[what]}
    if not same_measures(row, settings):
        other.add("measures")
    assert other == expected


def test_comments_names_places_and_resources_reuse_everything(make_wide, results, tmp_path):
    from raylab.job.jobs import dump_yaml

    base = make_wide("mlm", {})
    (tmp_path / "job.yaml").write_text("# another comment\n" + dump_yaml(base))
    commented = load_job(tmp_path / "job.yaml")
    assert commented == base
    changed = base.model_copy(
        update={
            "name": "renamed",
            "limits": base.limits.model_copy(update={"hours": 3.0}),
            "resources": base.resources.model_copy(update={"max_concurrent_trials": 1}),
            "search": base.search.model_copy(update={"seeds": (0, 1), "sampler_seed": 5}),
        }
    )
    assert identify(changed, results)[0] == identify(base, results)[0]
    assert identify(base, tmp_path / "elsewhere")[0] == identify(base, results)[0]


def test_a_stage_of_another_version_seed_or_data_is_another(make_wide, results, monkeypatch):
    job = make_wide("mlm", {})
    first = list_rungs(make_spec(prepare(job, results), {}, 0, "fixed"))
    second = list_rungs(make_spec(prepare(job, results), {}, 1, "fixed"))
    assert not {link.stage_id for link in first} & {link.stage_id for link in second}


def test_plan_foretells_what_runs_and_stages_tell_what_was_saved(make_job, tmp_path):
    """Three freeze depths on two objectives and two seeds share four pre-trainings; a second job finds half of its."""

    def plan_and_run(name, objectives):
        space = {
            "pretrain.objective": {"choices": objectives},
            "evaluate.frozen_layers": {"choices": ["all", "1"]},
            "evaluate.fine_tune.learning_rate": {"choices": [1e-4], "when": {"evaluate.frozen_layers": "1"}},
        }
        changes = {"name": name, "evaluate.fine_tune.steps": 2, "search": {"space": space, "seeds": [0, 1]}}
        changes |= {"pretrain.declutr": {"max_span": 24, "min_span": 8}} if "declutr" in objectives else {}
        job = make_job("mlm", changes)
        found = plan_job(job, tmp_path)
        run_job(job, tmp_path, SweepProgress(Console(quiet=True)), here=True)
        connection = open_tables(tmp_path)
        built = connection.execute(
            "select count(*) from stages where job = ? and kind = 'pretrain' and not reused and stage_id not in "
            "(select stage_id from stages where kind = 'pretrain' group by 1 having count(distinct trial_id) > 99)",
            [name],
        ).fetchone()[0]
        saved = connection.execute(
            "select sum(saved_seconds) from stages where job = ? and kind = 'pretrain' and reused", [name]
        ).fetchone()[0]
        return found, built, saved

    found, built, saved = plan_and_run("first", ["mlm", "none"])
    assert (found["trials"], found["trials_with_pretraining"], found["pretrainings"]) == (8, 4, 2)
    assert (found["pretrainings_found"], found["tokens"]) == (0, 2 * 12_000)
    # Two rungs each, and the start of each seed.
    assert built == 2 * 2 + 2
    assert saved > 0
    found, built, saved = plan_and_run("second", ["mlm", "declutr"])
    assert (found["trials_with_pretraining"], found["pretrainings"], found["pretrainings_found"]) == (8, 4, 2)
    assert found["tokens"] == 2 * 12_000
    # Intermediate rungs of mlm were pruned after the first job: its new arms measure the same, at rungs they lack.
    assert built >= 2 * 2
    assert saved > 0
    assert plan_job(make_job("mlm", {"name": "first"}), tmp_path)["pretrainings_found"] == 1
