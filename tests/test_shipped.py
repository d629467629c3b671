"""What is shipped beside the package: cluster.yaml, jobs, search spaces, the README's examples, and MedQuAD."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import typer
import yaml

from raylab.base.identity import digest
from raylab.cli import app, main
from raylab.data.corpus import read_corpus, split_corpus
from raylab.job.blocks import Corpus
from raylab.job.jobs import dump_yaml, load_job, merge, read_yaml
from raylab.job.settings import list_settings, with_settings
from raylab.job.specs import Choices, Job
from raylab.results.queries import open_tables
from raylab.results.tables import SCHEMAS
from raylab.results.views import VIEWS
from raylab.runs.plan import plan_comparisons
from raylab.runs.preparation import prepare
from raylab.search.search import Search

ROOT = Path(__file__).resolve().parent.parent
# Paths in a job are resolved, and the folder may be a link.
MEDQUAD = (ROOT.parent / "shared" / "data" / "medquad").resolve()
MEDQUAD_JOB = ROOT / "jobs" / "medquad_cpu.yaml"
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands

needs_medquad = pytest.mark.skipif(not MEDQUAD.is_dir(), reason=f"no MedQuAD at {MEDQUAD}")


def call(*arguments):
    """The `raylab` command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def read_fences(language):
    """The README's fenced blocks of a language, indented ones too, without their indent."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in block.splitlines()) for indent, block in found]


def read_code(text):
    """What stands as code in a page: fenced blocks and spans."""
    fences = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [*fences, *re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE))]


# cluster.yaml


def validate_cluster(cluster):
    """Ray's own offline check, in a process of its own: Ray reads its environment when it is imported."""
    script = (
        "import sys, yaml; from ray.autoscaler._private.util import prepare_config, validate_config; "
        "validate_config(prepare_config(yaml.safe_load(sys.stdin)))"
    )
    return subprocess.run(
        [sys.executable, "-c", script], input=yaml.safe_dump(cluster), capture_output=True, text=True, timeout=60
    )


@pytest.mark.ray
def test_ray_takes_cluster_yaml():
    checked = validate_cluster(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    assert checked.returncode == 0, checked.stderr


@pytest.mark.ray
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"worker_nodes_setup": []}, "'worker_nodes_setup' was unexpected"),
        ({"upscaling_speed": "fast"}, "'fast' is not of type 'number'"),
        ({"provider": {"type": "local"}}, "head_ip"),
    ],
)
def test_ray_refuses_a_broken_cluster_yaml(change, problem):
    checked = validate_cluster(yaml.safe_load((ROOT / "cluster.yaml").read_text()) | change)
    assert checked.returncode != 0
    assert problem in checked.stderr


def test_cluster_yaml_agrees_with_itself():
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert cluster["min_workers"] == cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    for command in (line for name, lines in cluster.items() if name.endswith("_commands") for line in lines):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, (command, checked.stderr)


# Jobs and search spaces


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_is_right_and_is_kept_as_it_is(path, tmp_path):
    job = load_job(path)
    (tmp_path / "job.yaml").write_text(dump_yaml(job))
    assert list_settings(load_job(tmp_path / "job.yaml")) == list_settings(job)
    assert ask_arms(job, tmp_path)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_shipped_job_that_has_arms_to_compare_says_which_first(path):
    job = load_job(path)
    assert (job.analysis.primary is not None) == bool(job.search.space)
    assert (plan_comparisons(job)["seeds_at_least"]["primary"] == 6) == bool(job.search.space)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_value_of_a_shipped_space_is_in_an_arm_that_can_run(path, tmp_path):
    """As a variant of the shipped job that names the space, else of medquad.yaml at the encoder's 512 positions."""
    named = [job for job in JOBS if Path(read_yaml(job).get("search", {}).get("space", "")).name == path.name]
    variant = {
        "base": str(named[0] if named else ROOT / "jobs" / "medquad.yaml"),
        "corpus": {} if named else {"max_length": 512},
        "search": {"space": str(path), "design": "random", "num_arms": 60, "confirm": None},
        "analysis": None,
    }
    if not named or named[0].stem == "medquad":
        variant["search"]["targets"] = [{"task": "question_type", "shots": 32}]
    (tmp_path / "variant.yaml").write_text(yaml.safe_dump(variant))
    job = load_job(tmp_path / "variant.yaml")
    arms = ask_arms(job, tmp_path)
    assert arms
    for name, entry in job.search.space.items():
        found = [values[name] for values in arms if name in values]
        if isinstance(entry, Choices):
            assert set(found) == set(entry.choices), name
        else:
            assert len(set(found)) > 1, name
            assert all(entry.low <= value <= entry.high for value in found), name


def ask_arms(job, folder):
    """The searched values of each arm that a job's search asks for, named without data; infeasible ones are not."""
    search = Search(job, folder, lambda values: digest(list_settings(with_settings(job, values))))
    arms = {}
    while (request := next_or_none(search)) is not None:
        arms[request.arm] = request.values
    return list(arms.values())


def next_or_none(search):
    try:
        return search.next_request()
    except StopIteration:
        return None


# The README


def test_the_readme_job_is_right(tmp_path):
    """Where its base and space lie: beside the shipped jobs."""
    for name in ("jobs", "search_spaces"):
        shutil.copytree(ROOT / name, tmp_path / name)
    whole = [block for block in read_fences("yaml") if "name" in yaml.safe_load(block)]
    assert len(whole) == 1
    path = tmp_path / "jobs" / "from_readme.yaml"
    path.write_text(whole[0])
    job = load_job(path)
    own = read_yaml(path)
    assert job.name == own["name"]
    assert len(job.search.space) == len(read_yaml(ROOT / "search_spaces" / Path(own["search"]["space"]).name))
    assert ask_arms(job, tmp_path)


def test_every_yaml_fragment_of_the_readme_is_yaml_of_known_settings():
    blocks = read_fences("yaml")
    assert len(blocks) == README.count("```yaml")
    for block in blocks:
        fragment = yaml.safe_load(block)
        assert isinstance(fragment, dict)
        assert set(fragment) <= {*Job.model_fields, "base"} or set(fragment) <= set(Corpus.model_fields)


def test_the_readme_sql_corpus_reads_tables_of_that_shape(tmp_path):
    """MIMIC-III's columns with made-up rows: one note a stay, its primary diagnosis first."""
    (block,) = [block for block in read_fences("yaml") if "sql" in block]
    rows = range(120)
    codes = [("4280", "V3001")[row % 2] for row in rows]
    notes = {
        "ROW_ID": list(rows),
        "SUBJECT_ID": [row // 2 for row in rows],
        "HADM_ID": [1000 + row for row in rows],
        "CATEGORY": ["Discharge summary" if row < 100 else "Nursing" for row in rows],
        "ISERROR": [1 if row == 7 else None for row in rows],
        "TEXT": [f'Seen on day {row}, "stable",\nand sent home.' for row in rows],
    }
    diagnoses = {
        "ROW_ID": [row + 500 for row in range(240)],
        "SUBJECT_ID": [row // 4 for row in range(240)],
        "HADM_ID": [1000 + row // 2 for row in range(240)],
        "SEQ_NUM": [1 + row % 2 for row in range(240)],
        "ICD9_CODE": [codes[row // 2] if row % 2 == 0 else "E8889" for row in range(240)],
    }
    pyarrow.csv.write_csv(pa.table(notes), tmp_path / "NOTEEVENTS.csv")
    pyarrow.csv.write_csv(pa.table(diagnoses), tmp_path / "DIAGNOSES_ICD.csv")
    corpus = merge(yaml.safe_load(block), {"tasks": {"diagnosis": {"min_class_size": 10}}})
    encoder = {"config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}
    raw = {"name": "mimic", "corpus": corpus, "encoder": encoder | {"tokenizer": {"vocab_size": 300}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    job = load_job(tmp_path / "job.yaml")
    split = split_corpus(read_corpus(job.corpus, []), job.corpus, [], 0)
    assert split.classes == {"diagnosis": ["428", "V30"]}
    assert {name: len(split.open[name]) + len(split.sealed[name]) for name in split.open} == {
        "documents": 119,
        "diagnosis": 100,
    }


def test_the_readme_space_entries_are_right(tmp_path):
    """Entries of a search space within its sentences, such as `pretrain.declutr.max_span: [64, 128]`."""
    spans = [span for span in read_code(README) if re.match(r"(pretrain|evaluate|encoder)(\.\w+)+: ", span)]
    assert len(spans) >= 2
    (tmp_path / "space.yaml").write_text("\n".join(spans))
    variant = {
        "base": str(ROOT / "jobs" / "medquad.yaml"),
        "pretrain": {"objective": "declutr"},
        "search": {"space": "space.yaml", "design": "random", "num_arms": 4, "targets": [{"task": "question_type"}]},
        "analysis": None,
    }
    (tmp_path / "variant.yaml").write_text(yaml.safe_dump(variant))
    job = load_job(tmp_path / "variant.yaml")
    assert len(job.search.space) == len(spans)
    assert ask_arms(job, tmp_path)


@pytest.mark.parametrize("page", ["README.md", "Makefile", "results/README.md", "cluster.yaml"])
def test_every_command_that_a_page_names_is_there(page, capsys):
    assert call("--help") == 0
    listed = capsys.readouterr().out
    text = (ROOT / page).read_text()
    code = read_code(text) if page.endswith(".md") else [text]
    named = {name for part in code for name in re.findall(r"(?:^|[\s/`])raylab ([a-z]+)\b", part, re.MULTILINE)}
    assert named
    for name in named:
        assert name in COMMANDS
        assert re.search(rf"^\W*{name}\s", listed, re.MULTILINE), name


def test_the_readme_lists_every_command_with_options_that_it_has():
    rows = re.findall(r"^\| (`raylab .*?) \| (.*) \|$", README, re.MULTILINE)
    listed = set()
    for commands, does in rows:
        names = re.findall(r"raylab ([a-z]+)", commands)
        listed.update(names)
        taken = {option for name in names for parameter in COMMANDS[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z]+", commands + does)) <= taken, names
    assert listed == set(COMMANDS)


def test_the_readme_lists_the_tables_and_names_only_what_is_there():
    tables = README.partition("## Tables")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)) == {*SCHEMAS, *VIEWS}
    for module, name in re.findall(r"`(raylab\.\w+\.\w+)\.(\w+)`", README):
        assert hasattr(importlib.import_module(module), name)
    # Files of the project: not of what is made up in examples, nor what a run writes.
    for span in re.findall(r"`([\w./]+(?:/|\.(?:py|txt|md|yaml)))`", README):
        assert [*ROOT.glob(span), *ROOT.glob(f"raylab/**/{span}")], span


QUERIES = [
    sql
    for page in ("README.md", "results/README.md")
    for part in read_code((ROOT / page).read_text())
    if part.startswith("raylab query")
    for sql in shlex.split(part)[2:]
    if sql not in ("SQL", "--list")
]


@pytest.mark.parametrize("sql", QUERIES)
def test_the_pages_queries_can_be_asked_before_anything_ran(sql, tmp_path, capsys):
    assert call("query", sql, "--results", tmp_path) == 0
    assert capsys.readouterr().err == ""


@needs_medquad
@pytest.mark.slow
@pytest.mark.parametrize("sql", QUERIES)
def test_the_pages_queries_answer(sql, tiny_run, capsys):
    """With a task of MedQuAD and the run's shots in the place of the README's."""
    sql = sql.replace("$$condition$$", "$$question_type$$").replace("shots = 32", "shots = 8")
    assert call("query", sql, "--results", tiny_run.results, "--format", "csv") == 0
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_there_are_queries():
    assert len(QUERIES) >= 2


# MedQuAD


class Ran(NamedTuple):
    """A run of the command: its exit code, its results folder and all that it printed."""

    code: int
    results: Path
    printed: str


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """The corpus of jobs/medquad_cpu.yaml, split."""
    return prepare(load_job(MEDQUAD_JOB), tmp_path_factory.mktemp("nothing")).split(0)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """`raylab run jobs/medquad_cpu.yaml --here`, made tiny, with the corpus folder named."""
    results = tmp_path_factory.mktemp("results")
    settings = {
        "pretrain.num_tokens": 30000,
        "search.seeds": [0],
        "evaluate.shots": [8],
        "evaluate.draws": 1,
        "encoder.tokenizer.vocab_size": 1000,
        "encoder.config.hidden_size": 32,
        "encoder.config.intermediate_size": 64,
        "analysis": "null",
    }
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = call("run", MEDQUAD_JOB, "--here", "--data", MEDQUAD, "--results", results, *changes)
    return Ran(code, results, printed.getvalue())


@needs_medquad
def test_medquad_has_its_classes_and_rows(split):
    assert {name: len(classes) for name, classes in split.classes.items()} == {"question_type": 13, "semantic_type": 6}
    assert {name: len(values) for name, values in split.categories.items()} == {"source": 9}
    for name, table, rows, unlabelled in (
        ("documents", "documents", 5486, 0),
        ("question_type", "passages", 16407, 0),
        ("semantic_type", "documents", 5486, 362),
    ):
        counts = split.counts[name]
        assert counts["rows_read"] == pq.read_metadata(MEDQUAD / f"{table}.parquet").num_rows == rows
        assert counts.get("unlabelled", 0) == unlabelled
        used = counts["train"] + counts["validation"] + counts["test"]
        assert used + counts["empty_text"] + counts.get("rare_or_unseen_class", 0) + unlabelled == rows
        assert used == len(split.open[name]) + len(split.sealed[name])
        for part, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
            assert counts[part] / used == pytest.approx(share, abs=0.02)


@needs_medquad
def test_no_medquad_group_is_on_two_sides(split):
    tables = [table.select(["group", "part"]) for side in (split.open, split.sealed) for table in side.values()]
    sides = pa.concat_tables(tables).group_by("group").aggregate([("part", "count_distinct")])
    assert len(sides) == 4662
    assert set(sides["part_count_distinct"].to_pylist()) == {1}


@needs_medquad
def test_the_source_of_a_medquad_page_gives_no_label_away(split):
    assert split.supervised_by == {}


@needs_medquad
def test_a_corpus_folder_can_be_named():
    """The same paths as those of the job file, which start at its folder."""
    job, named = load_job(MEDQUAD_JOB), load_job(MEDQUAD_JOB, data=MEDQUAD)
    assert named == job
    assert {Path(table.path).parent for table in (job.corpus.documents, *job.corpus.tasks.values())} == {MEDQUAD}


@needs_medquad
@pytest.mark.slow
def test_the_medquad_job_runs(tiny_run):
    assert tiny_run.code == 0, tiny_run.printed
    assert load_job(tiny_run.results / "medquad-cpu" / "job.yaml").corpus == load_job(MEDQUAD_JOB).corpus
    tables = open_tables(tiny_run.results)
    arms = tables.execute(
        """select "pretrain.objective", status, num_tokens >= 30000, supervised_by from trials
           where arm not like 'baseline:%' order by 1"""
    ).fetchall()
    complete = "complete"
    assert arms == [
        ("declutr", complete, True, None),
        ("metadata", complete, True, None),
        ("mlm", complete, True, None),
        ("none", complete, False, None),
    ]
    baselines = tables.execute("select arm, status from trials where arm like 'baseline:%' order by 1").fetchall()
    assert baselines == [("baseline:majority", complete), ("baseline:tfidf", complete)]


@needs_medquad
@pytest.mark.slow
def test_the_medquad_arms_are_all_scored(tiny_run):
    """Every arm and baseline on both tasks, on the same rows; nothing of the test split."""
    cells = (
        open_tables(tiny_run.results)
        .execute(
            """select task, count(distinct arm), list(distinct split), list(distinct num_train), list(distinct num_eval)
               from scores join trials using (job, trial_id) where metric = 'f1_macro' group by task order by task"""
        )
        .fetchall()
    )
    assert cells == [
        ("question_type", 6, ["validation"], [8 * 13], [1599]),
        ("semantic_type", 6, ["validation"], [8 * 6], [486]),
    ]


@needs_medquad
@pytest.mark.slow
def test_the_medquad_curves_hold_the_held_out_measures(tiny_run):
    """Of every arm before training and of a trained one at its end; retrieval among 256 candidates."""
    rows = (
        open_tables(tiny_run.results)
        .execute(
            """select "pretrain.objective", metric, count(*), min(value), max(value)
               from curves join trials using (job, trial_id) where metric like 'heldout%' group by all"""
        )
        .fetchall()
    )
    found = {(objective, metric): tuple(rest) for objective, metric, *rest in rows}
    for objective in ("none", "mlm", "declutr", "metadata"):
        num_points = 1 if objective == "none" else 2
        assert found[objective, "heldout_retrieval_candidates"] == (num_points, 256, 256)
        for metric in ("heldout_mlm_loss", "heldout_retrieval_accuracy"):
            assert found[objective, metric][0] == num_points
        assert 0 < found[objective, "heldout_mlm_loss"][1] < 10
        assert found[objective, "heldout_unigram_entropy"][0] >= 1
    assert found["mlm", "heldout_mlm_loss"][1] < found["none", "heldout_mlm_loss"][1]
    assert ("metadata", "heldout_category_accuracy") in found


@needs_medquad
@pytest.mark.slow
def test_no_medquad_text_is_in_tables_or_in_what_is_printed(tiny_run, split):
    """Runs of plain words of training texts, in no cell of a table, no other file of the job and no line printed."""
    runs = [
        " ".join(max(re.findall(r"[A-Za-z]+(?: [A-Za-z]+)*", text), key=len).split()[:6])
        for table in split.open.values()
        for text in table["text"].to_pylist()[:: len(table) // 40]
    ]
    runs = [run for run in runs if run.count(" ") >= 3]
    assert len(runs) >= 80
    files = [path for path in (tiny_run.results / "medquad-cpu").rglob("*") if path.is_file()]
    tables = [path for path in files if path.suffix == ".parquet"]
    assert {path.parent.name for path in tables} == set(SCHEMAS) - {"unseals"}
    cells = {str(cell) for path in tables for column in pq.read_table(path).columns for cell in column.to_pylist()}
    assert "medquad-cpu" in cells
    places = {path.name: path.read_bytes().decode("latin-1") for path in files}
    places |= {"cells": "\n".join(cells), "printed": tiny_run.printed}
    for place, held in places.items():
        for run in runs:
            assert run not in held, place
