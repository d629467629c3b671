"""The commands compare, effects and correlate."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from raylab.cli import main
from raylab.commands.output import output
from raylab.statistics.comparisons import compare_arms
from raylab.statistics.observations import read_observations

COLUMNS = ["--arm", "model", "--seed", "run", "--value", "f1"]


def call(*arguments):
    """The `raylab` command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def table(tmp_path):
    """`table({"a": 0.5, "b": 0.6}, 9)`: a CSV of models with these means, on so many runs of three folds."""

    def write(means, num_runs, noise=0.02):
        rng = np.random.default_rng(0)
        lines = ["model,run,fold,f1"]
        for name, mean in means.items():
            for run in range(num_runs):
                lines += [f"{name},{run},{fold},{mean + rng.normal(0, noise)}" for fold in range(3)]
        path = tmp_path / "scores.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_two_arms_of_a_table_are_told_in_one_sentence(table, capsys):
    path = table({"mlm": 0.5, "declutr": 0.6}, 9)
    assert call("compare", path, *COLUMNS, "--draw", "fold") == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("declutr beats mlm: mlm minus declutr is -0.")
    assert "over 9 shared seeds, sign-flip p = 0.0039" in line


def test_machines_get_all_that_was_computed(table, capsys):
    path = table({"a": 0.5, "b": 0.6, "c": 0.5}, 9)
    assert call("compare", path, *COLUMNS, "--draw", "fold", "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    arms = read_observations(path, arm="model", seed="run", value="f1", draw="fold")
    expected = compare_arms(arms, [("a", "b"), ("a", "c"), ("b", "c")], draws="shared")
    for row, one in zip(rows, expected, strict=True):
        for name in ("a", "b", "num_seeds", "difference", "low", "high", "p", "p_holm", "better", "num_comparisons"):
            assert row[name] == getattr(one, name)
    assert call("compare", path, *COLUMNS, "--draw", "fold", "--format", "csv") == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 3


def test_a_base_makes_a_family_of_its_own(table, capsys):
    path = table({"a": 0.5, "b": 0.6, "c": 0.7}, 9)
    assert call("compare", path, *COLUMNS, "--draw", "fold", "--base", "a") == 0
    out = capsys.readouterr().out
    assert out.startswith("Of 2 comparisons, with Holm's correction, shown: b over a; c over a.")
    assert call("compare", path, "a", "c", *COLUMNS, "--draw", "fold", "--lower") == 0
    assert capsys.readouterr().out.startswith("a beats c: ")


def test_people_get_a_table_that_fits_120_columns(table, capsys, monkeypatch):
    """Arms as long as those of a search over spans: a line each beside a base arm, two a pair."""
    monkeypatch.setattr(output, "_width", 120)
    long = [f"objective=declutr, max_span={span}, num_anchors=2" for span in (16, 48)]
    path = table({"base": 0.5, **{f'"{name}"': 0.6 for name in long}}, 9)
    assert call("compare", path, *COLUMNS, "--draw", "fold", "--base", "base") == 0
    told, common, *grid = capsys.readouterr().out.splitlines()
    assert told.startswith("Of 2 comparisons")
    assert common == "in all rows: B base, seeds 9"
    rows = [line for line in grid if line.startswith("│")]
    assert [name in row for name, row in zip(long, rows, strict=True)] == [True, True]
    assert max(map(len, grid)) <= 120
    assert all(name in "".join(grid) for name in ("A - B", "95 % interval", "p, Holm", "A won", "needed"))
    low, high = read_bounds(path)
    assert f"{low:+.3g} to {high:+.3g}" in rows[0]
    assert call("compare", path, *COLUMNS, "--draw", "fold") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(lines) == 3 * 2
    assert all(name in lines[place] for place, name in ((4, long[0]), (5, f"- {long[1]}")))


def read_bounds(path):
    """The interval of the second arm of a table minus the first."""
    first, second, *_ = arms = read_observations(path, arm="model", seed="run", value="f1", draw="fold")
    [row] = compare_arms(arms, [(second, first)], draws="shared")
    return row.low, row.high


def test_draws_of_one_name_are_taken_as_shared_unless_said(tmp_path, capsys):
    """One fold makes the whole difference, on every run."""
    path = tmp_path / "scores.csv"
    rows = [f"{m},{run},{fold},{0.001 * run * fold + 2.0 * (m == 'a' and fold == 0) - 0.3 * (m == 'a')}"
            for m in "ab" for run in range(8) for fold in range(4)]  # fmt: skip
    path.write_text("\n".join(["model,run,fold,f1", *rows]))
    assert call("compare", path, *COLUMNS, "--draw", "fold") == 0
    line = capsys.readouterr().out
    assert line.startswith("Not shown that a and b differ")
    assert "more draws would tell, not more seeds" in line


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["missing.csv"], "missing.csv: is not there; correct the path"),
        (["TABLE", *COLUMNS[2:], "--arm", "modle"], "--arm modle: no such column; did you mean 'model'?"),
        (["TABLE", *COLUMNS], "rows repeat the arm and seed of another; name what sets them apart with --draw"),
        (["TABLE", "a", "z", *COLUMNS, "--draw", "fold"], "'z': no such arm; there are a, b"),
        (["TABLE", "a", *COLUMNS, "--draw", "fold"], "two arms are needed, there is a"),
        (["TABLE", *COLUMNS, "--base", "z", "--draw", "fold"], "'z': no such arm"),
        (["TABLE", "--shots", "2"], "--at, --shots and --split are for jobs"),
        (["nojob", "--base", "a"], "are for tables, and 'nojob' is a job"),
        (["nojob"], "no job 'nojob' under"),
    ],
)
def test_a_wrong_question_is_one_line(arguments, problem, table, tmp_path, capsys):
    path = table({"a": 0.5, "b": 0.6}, 4)
    given = [str(path) if argument == "TABLE" else argument for argument in arguments]
    assert call("compare", *given, "--results", tmp_path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line


def test_arms_that_share_no_seed_and_one_seed(tmp_path, capsys):
    path = tmp_path / "scores.csv"
    path.write_text("model,run,f1\na,0,0.5\nb,1,0.6\n")
    assert call("compare", path, *COLUMNS) == 2
    assert "a and b share no seed" in capsys.readouterr().err
    path.write_text("model,run,f1\na,0,0.5\nb,0,0.6\n")
    assert call("compare", path, *COLUMNS) == 0
    assert capsys.readouterr().out == "One shared seed shows nothing of a and b: at least 6 are needed.\n"


def test_a_table_is_compared_without_what_trains_and_searches(table):
    path = table({"a": 0.5, "b": 0.6}, 9)
    heavy = ("torch", "ray", "sklearn", "transformers", "optuna", "pandas", "statsmodels")
    arguments = ["compare", str(path), *COLUMNS, "--draw", "fold"]
    code = (
        f"import sys\nfrom raylab.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit as end:\n"
        f"    assert not end.code\nprint([name for name in {heavy!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def swept(make_job, tmp_path_factory):
    """A results folder with a whole small sweep, run in this process: a grid over objectives on two seeds."""
    from rich.console import Console

    from raylab.job.jobs import dump_yaml
    from raylab.runs.progress import SweepProgress
    from raylab.runs.sweep import run_job

    folder = tmp_path_factory.mktemp("swept")
    space = {"pretrain.objective": ["none", "mlm", "declutr"]}
    changes = {
        "search": {"design": "grid", "space": space, "seeds": [0, 1]},
        "analysis": {"primary": "objective=declutr vs objective=none"},
    }
    job = make_job("declutr", changes)
    run_job(job, folder, SweepProgress(Console(quiet=True)), here=True)
    (folder / job.name / "job.yaml").write_text(dump_yaml(job))
    return folder


@pytest.mark.slow
def test_a_sweep_is_asked(swept, capsys):
    assert call("compare", "tiny", "--results", swept) == 0
    out = capsys.readouterr().out
    assert out.startswith("Primary: Not shown that objective=declutr and objective=none differ: ")
    assert "2 seeds can't show it, as p is never under 0.5: at least 6 are needed" in out
    assert "Exploratory: " in out
    assert "Best on validation: " in out
    assert "its test score is sealed" in out
    assert (
        call("compare", "tiny", "objective=mlm vs baseline:tfidf at shots=2", "--results", swept, "--format", "json")
        == 0
    )
    [row] = json.loads(capsys.readouterr().out)
    assert (row["role"], row["b"], row["num_seeds"], row["num_draws"]) == ("exploratory", "baseline:tfidf", 2, 2)
    assert call("compare", "tiny", "--shots", "3", "--results", swept) == 2
    assert "--at.shots: 3 is not evaluated; valid: 2" in capsys.readouterr().err
    assert call("effects", "tiny", "--results", swept, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["setting"], row["from"], row["to"]) for row in rows] == [
        ("pretrain.objective", "declutr", "none"), ("pretrain.objective", "declutr", "mlm")
    ]  # fmt: skip
    assert call("correlate", "tiny", "--results", swept, "--format", "json") == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert {row["scope"] for row in rows} >= {"all arms", "between objectives"}
    assert all(row["verdict"].startswith(("too few arms", "does not vary")) for row in rows)
    assert f"{len(rows)} correlations: " in captured.err
