"""What comparisons show, in words."""

import itertools
import json

import numpy as np

from raylab.statistics.comparisons import compare_arms
from raylab.statistics.verdicts import (
    EXPLORATORY,
    PRIMARY,
    Verdict,
    as_row,
    list_verdicts,
    tell_comparison,
    tell_verdicts,
)


def compare(values, num_seeds, noise=0.02, **options):
    """Arms of these means on so many seeds; all pairs."""
    rng = np.random.default_rng(0)
    arms = {
        name: {seed: {0: mean + rng.normal(0, noise)} for seed in range(num_seeds)} for name, mean in values.items()
    }
    return compare_arms(arms, list(itertools.combinations(arms, 2)), **options)


def tell(row, given="given this split"):
    return tell_comparison(row, row.a, row.b, given)


def test_a_shown_difference_names_the_better_arm_and_its_numbers():
    [row] = compare({"mlm": 0.5, "declutr": 0.6}, 9)
    sentence = tell(row)
    assert sentence.startswith("declutr beats mlm: mlm minus declutr is -0.")
    assert "over 9 shared seeds, sign-flip p = 0.0039" in sentence
    assert sentence.endswith("; given this split.")
    assert tell(row, "").endswith("0.0039.")


def test_few_seeds_are_told_what_they_can_not_show():
    [row] = compare({"a": 0.5, "b": 0.9}, 3)
    sentence = tell(row)
    assert sentence.startswith("Not shown that a and b differ: ")
    assert "3 seeds can't show it, as p is never under 0.25: at least 6 are needed" in sentence
    assert "about 6 seeds would decide it" in sentence
    assert "an estimate" in sentence
    [row] = compare({"a": 0.5, "b": 0.9}, 1)
    assert tell(row) == "One shared seed shows nothing of a and b: at least 6 are needed; given this split."


def test_a_family_is_told_how_many_seeds_it_needs():
    ten = {f"arm{number}": 0.1 * number for number in range(10)}
    rows = compare(ten, 10)
    assert len(rows) == 45
    assert "10 seeds can't show it, as p is never under 0.002: at least 11 are needed for 45 comparisons" in tell(
        rows[0]
    )
    assert all(row.better is None for row in rows)
    assert all(row.better == "b" for row in compare(ten, 11))


def test_an_undecided_difference_is_told_the_seeds_that_would_decide_it():
    [row] = compare({"a": 0.5, "b": 0.505}, 9)
    assert row.better is None
    sentence = tell(row)
    assert f"about {row.seeds_needed} seeds would decide it" in sentence
    assert row.seeds_needed > 9
    assert "can't show" not in sentence


def test_the_primary_comparison_stands_first_and_the_others_together():
    rows = compare({"a": 0.5, "b": 0.6, "c": 0.7}, 9)
    verdicts = [Verdict(EXPLORATORY, row.a, row.b, tell(row), row) for row in rows]
    first, *rest = verdicts
    told = tell_verdicts([first._replace(role=PRIMARY), *rest])
    assert told[0] == f"Primary: {first.sentence}"
    assert told[1] == "Exploratory: Of 2 comparisons, with Holm's correction, shown: c over a; c over b."
    nothing = compare({"a": 0.5, "b": 0.5, "c": 0.5}, 3)
    told = tell_verdicts([Verdict(EXPLORATORY, row.a, row.b, tell(row), row) for row in nothing])
    assert told == [
        "Exploratory: Of 3 comparisons, with Holm's correction, no arm is shown to be better than another; 3 have too "
        "few seeds for it, 7 are needed at least."
    ]


def test_rows_are_plain_values():
    [row] = compare({"a": 0.5, "b": 0.9}, 1)
    values = as_row(row)
    assert values["p"] is None
    assert values["mixed_p"] is None
    [listed] = list_verdicts([Verdict(PRIMARY, "A", "B", "told", row)])
    assert json.loads(json.dumps(listed, allow_nan=False))["verdict"] == "told"
