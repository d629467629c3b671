"""The report's section on shots and freeze depths: means on the arms' seeds, with whatever probes each arm has."""

import datetime

import pytest

from raylab.job.settings import list_settings, resolve_target, with_settings
from raylab.report.conclusions import tell_arms, tell_question
from raylab.report.drawing import STYLE, render
from raylab.report.grid import read_grid, tell_grid
from raylab.report.parts import Plot, Study, Table, tell_cell
from raylab.results.tables import write_rows
from raylab.statistics.analysis import default_target, list_arms

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
CELL = {"task": "severity", "metric": "f1_macro", "rung": 1, "split": "validation", "draw": 0}
RATES = (1e-3, 1e-2)


@pytest.fixture
def make_study(make_job, tmp_path):
    """`make_study({"arm": [row, ...]})`: arms of RATES on two seeds, and a baseline that has a third one too."""

    def make(scores, *, probes=("logistic", "mlp"), depths=("all",), targets=()):
        job = make_job("mlm", {
            "search": {"design": "grid", "space": {"pretrain.learning_rate": [*RATES]}, "seeds": [0, 1],
                       "targets": [*targets]},
            "evaluate": {"probes": [*probes], "shots": [2, "full"], "frozen_layers": [*depths]},
        })  # fmt: skip
        ran = [(f"arm{number}", rate, (0, 1)) for number, rate in enumerate(RATES)]
        for arm, rate, seeds in (*ran, ("baseline:tfidf", RATES[0], (0, 1, 2))):
            settings = list_settings(with_settings(job, {"pretrain.learning_rate": rate}))
            for seed in seeds:
                row = {"arm": arm, "seed": seed, "phase": "fixed", "status": "complete", "rung": 1, "num_rungs": 1}
                write_rows(tmp_path, job.name, "trials", f"{arm}-{seed}", [settings | row | {"started_at": START}])
                write_rows(tmp_path, job.name, "scores", f"{arm}-{seed}", [
                    CELL | {"shots": 2, "num_train": 6, "value": 0.5 + 0.1 * seed} | given
                    for given in scores.get(arm, [{"frozen_layers": None, "probe": None}])
                ])  # fmt: skip
        target = default_target(job)
        return Study(tmp_path, job, target, resolve_target(job, target), list_arms(tmp_path, job))

    return make


def plots_of(section):
    return {part.name: part for part in section.parts if isinstance(part, Plot)}


LOGISTIC, MLP = ({"frozen_layers": "all", "probe": probe} for probe in ("logistic", "mlp"))


def test_baselines_have_the_arms_seeds_in_every_section(make_study):
    study = make_study({arm: [LOGISTIC] for arm in ("arm0", "arm1")})
    [row] = [row for row in read_grid(study, "severity", "f1_macro") if row["arm"] == "baseline:tfidf"]
    assert (row["num_seeds"], row["mean"], row["label"]) == (2, pytest.approx(0.55), "tfidf (baseline)")
    [ranked] = [row for row in plots_of(tell_arms(study))["arms-ranked"].rows if row["arm"] == "baseline:tfidf"]
    assert ranked["mean"] == row["mean"]


def test_counts_of_training_rows_under_ten_are_not_told(make_study):
    study = make_study({"arm0": [LOGISTIC, LOGISTIC | {"shots": None, "num_train": 40}], "arm1": [LOGISTIC]})
    rows = read_grid(study, "severity", "f1_macro")
    assert {(row["shots"], row["num_train"]) for row in rows} == {("2", "<10"), ("full", 40)}


def test_an_arm_without_the_shown_probe_is_left_out_of_the_figures(make_study):
    both = [LOGISTIC, LOGISTIC | {"shots": None, "value": 0.9}]
    other = [MLP | {"value": 0.95}, MLP | {"shots": None, "value": 0.95}]
    plots = plots_of(tell_grid(make_study({"arm0": both, "arm1": other})))
    for name in ("shots-by-depth", "score-by-shots"):
        assert {row["arm"] for row in plots[name].rows} - {"baseline:tfidf"} == {"arm0"}, name


def test_powers_are_plain_numbers_where_formulas_are_off(make_study):
    import matplotlib

    whole = {"frozen_layers": "none", "probe": "mlp", "parameters_updated": 2_000_000, "value": 0.8}
    scores = {arm: [LOGISTIC | {"parameters_updated": 390}, whole] for arm in ("arm0", "arm1")}
    with matplotlib.rc_context(STYLE):
        plot = plots_of(tell_grid(make_study(scores, depths=("all", "none"))))["score-by-parameters"]
        # A label of data may hold what would be a formula that can't be read.
        plot.figure.axes[0].set_title(r"paid in $\frac$")
        assert all(render(plot.figure))
        ticks = [text.get_text() for text in plot.figure.axes[0].get_xticklabels() if text.get_text()]
    assert ticks
    assert not any("$" in text for text in ticks)
    assert {float(text) for text in ticks} >= {1e3, 1e5}


def test_which_side_is_better_is_said_where_it_is_the_lower_one(make_study):
    metric = "calibration_error"
    target = {"task": "severity", "metric": metric, "mode": "min"}
    rows = {arm: [LOGISTIC | {"metric": metric, "value": value}] for arm, value in (("arm0", 0.3), ("arm1", 0.1))}
    rows["baseline:tfidf"] = [{"frozen_layers": None, "probe": None, "metric": metric, "value": 0.2}]
    study = make_study(rows, targets=[target])
    question = tell_question(study)
    assert "A won: the share of the shared seeds on which A is better, which is lower." in question.parts[0]
    [compared] = [part for part in question.parts if isinstance(part, Table)]
    [row] = compared.rows
    assert (row["label_a"], row["superiority"]) == ("learning_rate=0.01", 1.0)
    assert row["difference"] == pytest.approx(-0.2)
    arms = tell_arms(study)
    assert "lower is better" in arms.lead[0]
    assert "best first, from learning_rate=0.01 with 0.100 to learning_rate=0.001 with 0.300" in arms.parts[0].alt
    assert "Lower is better." in tell_grid(study).lead[0]


def test_a_cell_of_all_training_rows_says_so():
    assert tell_cell({"task": "severity", "shots": None, "class": None}) == "task=severity, shots=full"
    assert tell_cell({"task": "severity", "parameter": None}) == "task=severity"
