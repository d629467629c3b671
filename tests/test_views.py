"""Queries as people write them: settings without quotes, ready views, and columns that are not read."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_queries import CELL, write_scores, write_trial

from raylab.base.mistakes import JobError
from raylab.results.queries import open_tables, query, read_cell
from raylab.results.tables import write_rows

SPAN = "pretrain.declutr.max_span"
JOB = """
name: study
corpus:
  documents: {path: notes.parquet, text: text}
  tasks: {kind: {path: notes.parquet, text: text, label: kind}}
encoder: {config: {}, tokenizer: {}}
pretrain: {objective: declutr, num_tokens: 1000000}
search: {design: grid, space: {pretrain.declutr.max_span: [64, 128]}, seeds: [0, 1, 2]}
"""


def test_settings_need_no_quotes(tmp_path: Path) -> None:
    for number in range(3):
        write_trial(tmp_path, f"a-{number}", **{SPAN: 64 * number, "pretrain.objective": "declutr"})
    ask = """
        select t.pretrain.declutr.max_span as own, Pretrain.Declutr.Max_Span as other,
            "pretrain.declutr.max_span" as third, 'pretrain.declutr.max_span' as text -- pretrain.declutr.max_span
        from trials as t where pretrain.declutr.max_span > 0 and pretrain.objective = 'declutr' order by own
    """
    assert query(tmp_path, ask).to_pylist() == [
        {"own": 64 * number, "other": 64 * number, "third": 64 * number, "text": SPAN} for number in (1, 2)
    ]
    assert query(tmp_path, f"select {SPAN} from trials").column_names == [SPAN]
    with pytest.raises(JobError, match=r"^query: .*'raylab query --list'"):
        query(tmp_path, "select pretrain.declutr.nothing from trials")


@pytest.mark.parametrize(
    "sql",
    [
        "from scores order by all",
        "select s from scores s order by all",
        "select main.scores from scores order by all",
        "select columns('.*s') from scores order by all",
        "select count(*) from scores natural join trials",
        "select a, b from scores as s(a, b) order by all",
        "select count(*) from scores",
        "select 1 from trials",
        "select TRIAL_ID, max(VALUE) from scores group by all order by all",
        "with x as (select trial_id as t, value from scores) select t, avg(value) from x group by t order by t",
        "select s.value from scores s join trials t using (job, trial_id) where t.arm = 'a' order by all",
        "select count(distinct s) from scores s",
        "from (pivot scores on draw using avg(value)) order by all",
        "select (select max(value) from scores s where s.trial_id = t.trial_id) from trials t order by all",
        "select list(draw order by value) over (partition by trial_id) from scores order by all",
    ],
)
def test_columns_that_are_not_read_change_no_answer(tmp_path: Path, sql: str) -> None:
    for trial_id in ("a-0", "a-1", "b-0"):
        write_trial(tmp_path, trial_id)
        write_scores(tmp_path, trial_id, [0.25, 0.5, int(trial_id[-1])])
    with open_tables(tmp_path) as tables:
        assert query(tmp_path, sql).to_pylist() == tables.sql(sql).to_arrow_table().to_pylist()


@pytest.fixture
def studied(tmp_path: Path) -> Path:
    """A base arm of span 128, one of 64 with a seed more, a search's and a baseline; made-up scores."""
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "job.yaml").write_text(JOB)
    values = {"base": [0.5, 0.6, 0.7], "other": [0.8, 0.7, 0.9, 0.1]}
    for arm, found in values.items():
        for seed, value in enumerate(found):
            trial_id, span = f"{arm}-{seed}", 128 if arm == "base" else 64
            write_trial(tmp_path, trial_id, **{SPAN: span}, gpu_seconds=2.0, num_tokens=10, flops=1e9)
            cell = CELL | {"rung": 2, "split": "validation"}
            rows = [cell | {"draw": draw, "value": value + (draw - 1) / 10} for draw in range(3)]
            rows += [
                cell | {"draw": 0, "rung": 1, "value": 0.0},
                cell | {"metric": "calibration_error", "value": value},
            ]
            write_rows(tmp_path, "study", "scores", trial_id, rows)
            point = {"rung": 2, "task": "kind", "split": "validation", "metric": "alignment", "parameter": 2.0}
            write_rows(tmp_path, "study", "geometry", trial_id, [point | {"value": value}, point | {"value": None}])
            stages = [{"stage_id": "x", "reused": seed > 0, "saved_seconds": 4.0 if seed else None}]
            write_rows(tmp_path, "study", "stages", trial_id, stages)
    write_trial(tmp_path, "searched-0", phase="search", **{SPAN: 64})
    write_scores(tmp_path, "searched-0", [1.0])
    for seed in range(3):
        write_trial(tmp_path, f"baseline:majority-{seed}")
        write_scores(tmp_path, f"baseline:majority-{seed}", [0.25], frozen_layers=None, probe=None)
    return tmp_path


def interval(values: list[float]) -> list[Any]:
    from raylab.results.ranking import compute_interval

    found = compute_interval(values)
    return [pytest.approx(found.mean), pytest.approx(found.low), pytest.approx(found.high), len(values)]


def ask(results: Path, sql: str) -> list[list[Any]]:
    return [list(row.values()) for row in query(results, sql).to_pylist()]


def test_arms_have_means_and_intervals_over_seeds(studied: Path) -> None:
    found = ask(studied, "select arm, label, mean, low, high, seeds from arms where metric = 'f1_macro' order by arm")
    assert found == [
        ["base", "max_span=128", *interval([0.5, 0.6, 0.7])],
        ["baseline:majority", "baseline:majority", *interval([0.25] * 3)],
        ["other", "max_span=64", *interval([0.8, 0.7, 0.9, 0.1])],
    ]
    found = ask(studied, "select arm, mean, seeds from arms where metric = 'alignment' and parameter = 2 order by arm")
    assert found == [["base", pytest.approx(0.6), 3], ["other", pytest.approx(0.625), 4]]


def test_one_seed_has_no_interval_and_seeds_are_those_of_the_ranking(studied: Path) -> None:
    write_trial(studied, "third-0")
    write_scores(studied, "third-0", [0.5, 0.7])
    assert ask(studied, "select mean, low, high, seeds from arms where arm = 'third'") == [
        [pytest.approx(0.6), None, None, 1]
    ]
    found = ask(studied, "select arm, seed, value from seeds where metric = 'f1_macro' order by all")
    expected = read_cell(studied, "study", "scores", CELL)
    assert found == [[row.arm, row.seed, pytest.approx(row.value)] for row in expected]


def test_the_best_is_best_by_its_metric(studied: Path) -> None:
    found = ask(studied, "select metric, arm from best order by metric")
    assert found == [["alignment", "base"], ["calibration_error", "base"], ["f1_macro", "other"]]


def test_effects_are_paired_on_shared_seeds(studied: Path) -> None:
    sql = "select arm, probe, mean, low, high, seeds from effects where metric = 'f1_macro' order by arm"
    assert ask(studied, sql) == [
        ["baseline:majority", "logistic", *interval([-0.25, -0.35, -0.45])],
        ["other", "logistic", *interval([0.3, 0.1, 0.2])],
    ]


def test_cost_is_of_all_trials_of_an_arm(studied: Path) -> None:
    sql = "select label, trials, wall_seconds, gpu_seconds, num_tokens, flops, stages, reused, saved_seconds from cost"
    assert ask(studied, f"{sql} where arm = 'other'") == [["max_span=64", 4, 6.0, 8.0, 40, 4e9, 4, 3, 12.0]]
    assert ask(studied, f"{sql} where arm = 'searched'") == [["max_span=64", 1, 1.5, None, None, None, 0, 0, 0.0]]


def test_views_of_a_folder_without_job_files_or_rows(tmp_path: Path) -> None:
    for view in ("seeds", "arms", "best", "effects", "cost"):
        assert query(tmp_path, f"from {view}").num_rows == 0
    write_trial(tmp_path, "a-0")
    write_scores(tmp_path, "a-0", [0.5])
    assert ask(tmp_path, "select arm, label, mean from arms") == [["a", None, 0.5]]
    assert query(tmp_path, "from effects").num_rows == 0


def test_quantiles_are_those_of_scipy() -> None:
    from scipy import stats

    from raylab.results.views import list_quantiles

    expected = [stats.t.ppf(0.975, degrees) for degrees in range(1, len(list_quantiles()) + 1)]
    assert list_quantiles() == pytest.approx(expected, rel=1e-10)


def test_results_can_be_asked_from_python(studied: Path) -> None:
    import pandas as pd
    import pyarrow as pa

    import raylab

    results = raylab.open_results(studied)
    scores = results.table("scores")
    assert isinstance(scores, pa.Table)
    assert scores.to_pylist() == query(studied, "from scores").to_pylist()
    frame = results.frame(f"select arm, max({SPAN}) as span from trials where arm = 'base' group by arm")
    assert isinstance(frame, pd.DataFrame)
    assert frame.to_dict("records") == [{"arm": "base", "span": 128}]
    with results.connect() as tables:
        assert tables.sql("select count(*) from arms").fetchall() == [(len(results.table("arms")),)]
        write_trial(studied, "late-0")
        assert tables.sql("select count(*) from trials where arm = 'late'").fetchall() == [(0,)]
    assert results.query("select count(*) as n from trials where arm = 'late'").to_pylist() == [{"n": 1}]
    with pytest.raises(JobError, match="no such folder"):
        raylab.open_results(studied / "nothing")


def test_importing_raylab_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "pandas", "pyarrow", "duckdb", "sklearn", "optuna")
    code = f"import raylab, sys; raylab.open_results; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_readme_s_python_runs(studied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (studied.parent / "root").mkdir()
    (studied.parent / "root" / "results").symlink_to(studied)
    monkeypatch.chdir(studied.parent / "root")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["count"] == len(names["results"].table("trials"))
    assert list(names["best"].columns) == ["job", "label", "mean"]
    assert names["scores"].num_rows > 0
