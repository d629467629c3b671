"""Effects and interactions: planted ones are named, and nothing else."""

import datetime
import itertools

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols

from raylab.base.mistakes import JobError
from raylab.job.settings import list_settings, with_settings
from raylab.results.tables import write_rows
from raylab.statistics.effects import (
    Change,
    apply_contrast,
    compute_effects,
    list_contrasts,
    list_effect_rows,
    list_effects,
    weigh_change,
)

ORDERED = {name: [0, 1] for name in "abcd"}
CELL = {"task": "severity", "metric": "f1_macro", "shots": 2, "frozen_layers": "all", "probe": "logistic"}
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def make_factorial(rng, num_seeds=10, num_draws=3, **planted):
    """Arms of 2^4 levels, and scores with planted effects (a=0.2; ab=0.1: more of a with b), by seed and draw."""
    levels = {
        "".join(map(str, point)): dict(zip("abcd", point, strict=True)) for point in itertools.product((0, 1), repeat=4)
    }
    seeds = rng.normal(0, 0.2, (num_seeds, 1))
    scores = {}
    for arm, own in levels.items():
        mean = sum(size * all(own[name] for name in names) for names, size in planted.items())
        values = mean + seeds + rng.normal(0, 0.05, (num_seeds, 1)) + rng.normal(0, 0.1, (num_seeds, num_draws))
        scores[arm] = {seed: dict(enumerate(map(float, row))) for seed, row in enumerate(values)}
    return levels, scores


def name_shown(effects):
    """The effects shown, by the settings' names: 'a', 'ab'."""
    shown = [effect.contrast for effect in effects if effect.comparison.better is not None]
    return {c.change.setting + (c.by.setting if c.by else "") for c in shown}


def test_planted_effects_and_one_interaction_are_named_and_nothing_else():
    """In every sweep those that are there; something else in no more sweeps than the family's 5 % makes likely."""
    others = 0
    for case in range(40):
        # Main effects are those of the marginal means: b adds 0.4 to half of the arms.
        levels, scores = make_factorial(np.random.default_rng(case), num_seeds=12, a=0.3, c=-0.3, ab=0.4)
        effects = compute_effects(scores, list_contrasts(levels, ORDERED))
        assert len(effects) == 4 + 6
        assert {effect.comparison.num_comparisons for effect in effects} == {10}
        named = name_shown(effects)
        assert named >= {"a", "b", "c", "ab"}
        others += named != {"a", "b", "c", "ab"}
    assert others <= 5  # the 98 % point of 40 sweeps at 5 %


def test_noise_is_named_in_few_sweeps():
    named = [
        name_shown(compute_effects(scores, list_contrasts(levels, ORDERED)))
        for levels, scores in (make_factorial(np.random.default_rng(1000 + case), num_seeds=9) for case in range(100))
    ]
    assert sum(map(bool, named)) <= 10  # the 98 % point of a rate of 5 %


@pytest.mark.parametrize("case", range(10))
def test_effects_are_those_of_a_linear_model(case):
    """A balanced factorial's contrasts are the coefficients of ordinary least squares in effect coding."""
    levels, scores = make_factorial(np.random.default_rng(case), a=0.2, bd=-0.3)
    frame = pd.DataFrame(
        [
            {**levels[arm], "y": value}
            for arm, seeds in scores.items()
            for draws in seeds.values()
            for value in draws.values()
        ]
    )
    frame[list("abcd")] -= 0.5
    fitted = ols("y ~ (a + b + c + d) ** 2", frame).fit()
    for contrast, _, row in compute_effects(scores, list_contrasts(levels, ORDERED)):
        name = contrast.change.setting + (f":{contrast.by.setting}" if contrast.by else "")
        assert row.difference == pytest.approx(fitted.params[name])


def test_a_setting_that_only_some_arms_read_is_averaged_over():
    levels = {
        "mlm": {"objective": "mlm", "span": None},
        "short": {"objective": "declutr", "span": 16},
        "long": {"objective": "declutr", "span": 64},
    }
    assert weigh_change(levels, [Change("objective", "mlm", "declutr")]) == {"mlm": -1.0, "short": 0.5, "long": 0.5}
    assert weigh_change(levels, [Change("span", 16, 64)]) == {"short": -1.0, "long": 1.0}
    found = list_contrasts(levels, {"objective": ["mlm", "declutr"], "span": [16, 64]})
    assert [(contrast.change.setting, contrast.by) for contrast in found] == [("objective", None), ("span", None)]


def test_arms_without_a_match_are_left_out():
    levels = {"00": {"a": 0, "b": 0}, "10": {"a": 1, "b": 0}, "01": {"a": 0, "b": 1}}
    assert weigh_change(levels, [Change("a", 0, 1)]) == {"00": -1.0, "10": 1.0}
    assert weigh_change(levels, [Change("a", 0, 1), Change("b", 0, 1)]) == {}


def test_only_seeds_and_draws_that_all_arms_have_count():
    scores = {"x": {0: {0: 1.0, 1: 2.0}, 1: {0: 3.0}}, "y": {0: {0: 0.5}, 2: {0: 1.0}}}
    assert apply_contrast(scores, {"x": 1.0, "y": -1.0}) == {0: {0: 0.5}}


@pytest.fixture
def sweep(make_job, tmp_path):
    """`sweep(design, space, mean)`: a job whose arms all ran on nine seeds; `mean(values)` is an arm's."""

    def run(design, space, points, mean):
        rng = np.random.default_rng(0)
        job = make_job("declutr", {"search": {"design": design, "space": space, "seeds": list(range(9))}})
        for number, values in enumerate(points):
            settings = list_settings(with_settings(job, values))
            for seed in range(9):
                row = {
                    **settings, "arm": f"arm{number}", "seed": seed, "phase": "fixed", "status": "complete", "rung": 1,
                    "num_rungs": 1, "started_at": START,
                }  # fmt: skip
                write_rows(tmp_path, job.name, "trials", f"arm{number}-{seed}", [row])
                rows = [
                    {
                        **CELL,
                        "rung": 1,
                        "split": "validation",
                        "draw": draw,
                        "value": mean(settings) + rng.normal(0, 0.01),
                    }
                    for draw in (0, 1)
                ]
                write_rows(tmp_path, job.name, "scores", f"arm{number}-{seed}", rows)
        return job

    return run


def test_a_planted_sweep_is_told_from_its_tables(sweep, tmp_path):
    names = ("pretrain.declutr.temperature", "pretrain.declutr.num_anchors", "pretrain.declutr.sampling")
    space = dict(zip(names, ([0.05, 0.1], [1, 2], ["any", "adjacent"]), strict=True))
    points = [dict(zip(names, point, strict=True)) for point in itertools.product(*space.values())]

    def mean(settings):
        hot, single = settings[names[0]] == 0.1, settings[names[1]] == 1
        return 0.5 + 0.1 * hot - 0.05 * (hot and single) - 0.05 * (single and not hot)

    rows = list_effect_rows(list_effects(tmp_path, sweep("factorial", space, points, mean)))
    assert len(rows) == 3 + 3
    shown = {(row["setting"], row["from"], row["to"]): row for row in rows if row["shown"]}
    assert set(shown) == {(names[0], 0.05, 0.1), (names[1], 2, 1)}
    assert shown[names[0], 0.05, 0.1]["difference"] == pytest.approx(0.1, abs=0.01)
    assert shown[names[1], 2, 1]["difference"] == pytest.approx(-0.05, abs=0.01)
    assert {row["effect"] for row in rows} == {"main", "interaction"}
    assert "temperature 0.05 to 0.1 raises the score: +0." in shown[names[0], 0.05, 0.1]["verdict"]
    [quiet] = [row for row in rows if row["setting"] == names[2] and row["effect"] == "main"]
    assert quiet["verdict"].startswith("No effect shown of sampling any to adjacent: ")


def test_single_changes_are_set_against_the_base_arm(sweep, tmp_path):
    space = {"pretrain.objective": ["mlm", "none"], "pretrain.declutr.temperature": [0.1]}
    points = [{}, {"pretrain.objective": "mlm"}, {"pretrain.objective": "none"}, {"pretrain.declutr.temperature": 0.1}]
    worth = {"declutr": 0.6, "mlm": 0.5, "none": 0.5}
    job = sweep("one_factor", space, points, lambda settings: worth[settings["pretrain.objective"]])
    rows = list_effect_rows(list_effects(tmp_path, job))
    assert [(row["from"], row["to"], row["shown"], row["num_arms"]) for row in rows] == [
        ("declutr", "mlm", True, 2), ("declutr", "none", True, 2), (0.05, 0.1, False, 2)
    ]  # fmt: skip
    assert rows[0]["difference"] == pytest.approx(-0.1, abs=0.01)


def test_a_search_has_no_effects(make_job, tmp_path):
    search = {
        "design": "random",
        "num_arms": 2,
        "targets": [{"task": "severity"}],
        "space": {"pretrain.objective": ["mlm"]},
    }
    with pytest.raises(JobError, match=r"is a search \(random\), whose arms are no design; see importances"):
        list_effects(tmp_path, make_job("mlm", {"search": search}))
