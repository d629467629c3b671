"""What comparisons show, in words: never more than the number of seeds can carry."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from raylab.statistics.comparisons import ALPHA, Comparison

Role = Literal["primary", "exploratory"]
PRIMARY: Role = "primary"
EXPLORATORY: Role = "exploratory"


class Verdict(NamedTuple):
    """A comparison, what it is part of, and what it shows, in one sentence."""

    role: Role
    label_a: str
    label_b: str
    sentence: str
    comparison: Comparison


def tell_comparison(row: Comparison, a: str, b: str, given: str = "") -> str:
    """The verdict in one sentence: what is shown, or what can't be with so many seeds and how many would decide it.

    `a` and `b` are the arms for people; `given` is what all seeds shared, such as the split.
    """
    end = f"; {given}." if given else "."
    if row.num_seeds < 2:
        return f"One shared seed shows nothing of {a} and {b}: at least {row.seeds_at_least} are needed{end}"
    tested = tell_numbers(row)
    if row.better is not None:
        first, second = (a, b) if row.better == "a" else (b, a)
        return f"{first} beats {second}: {a} minus {b} is {tested}{end}"
    return tell_doubt(row, f"Not shown that {a} and {b} differ: {tested}", given)


def tell_numbers(row: Comparison) -> str:
    """Difference, interval, seeds and p of a comparison of two seeds or more."""
    holm = f" (Holm over {row.num_comparisons} comparisons: {row.p_holm:.2g})" if row.num_comparisons > 1 else ""
    interval = f"{row.difference:+.3g} [{row.low:+.3g}, {row.high:+.3g}]"
    return f"{interval} over {row.num_seeds} shared seeds, sign-flip p = {row.p:.2g}{holm}"


def tell_doubt(row: Comparison, start: str, given: str = "") -> str:
    """The sentence of a comparison that shows nothing, from its `start`: why, and how many seeds would decide it."""
    end = f"; {given}." if given else "."
    many = "over 1,000" if row.seeds_needed is None else f"about {row.seeds_needed}"
    estimate = f"{many} seeds would decide it, were difference and SD ({row.sd:.2g}) as seen: an estimate"
    if row.num_seeds < row.seeds_at_least:
        asked = f" for {row.num_comparisons} comparisons" if row.num_comparisons > 1 else ""
        return (
            f"{start}; {row.num_seeds} seeds can't show it, as p is never under {row.smallest_p:.2g}: at least "
            f"{row.seeds_at_least} are needed{asked}, and {estimate}{end}"
        )
    if row.p_draws is not None and row.p_draws > ALPHA >= row.p:
        return f"{start}, but {row.p_draws:.2g} for other draws too: more draws would tell, not more seeds{end}"
    return f"{start}; {estimate}{end}"


def as_row(row: Comparison) -> dict[str, Any]:
    """A comparison as one row of plain values, null where it is not defined."""
    values = row._asdict()
    mixed = values.pop("mixed")
    parts = dict.fromkeys(("mean", "low", "high", "p", "sd_seed", "sd_draw")) if mixed is None else mixed._asdict()
    values |= {f"mixed_{name}": value for name, value in parts.items()}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def tell_family(verdicts: Sequence[Verdict]) -> str:
    """What comparisons of one family show together, in one sentence."""
    if len(verdicts) == 1:
        return verdicts[0].sentence
    pairs = []
    for verdict in verdicts:
        names = (verdict.label_a, verdict.label_b)
        if (better := verdict.comparison.better) is not None:
            pairs.append(" over ".join(names if better == "a" else names[::-1]))
    shown = f"shown: {'; '.join(pairs)}" if pairs else "no arm is shown to be better than another"
    few = [
        verdict.comparison for verdict in verdicts if verdict.comparison.num_seeds < verdict.comparison.seeds_at_least
    ]
    short = f"; {len(few)} have too few seeds for it, {few[0].seeds_at_least} are needed at least" if few else ""
    return f"Of {len(verdicts)} comparisons, with Holm's correction, {shown}{short}."


def tell_verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    """The answer of a job: the primary comparison's sentence, then what the exploratory ones show together."""
    told = [f"Primary: {verdict.sentence}" for verdict in verdicts if verdict.role == PRIMARY]
    explored = [verdict for verdict in verdicts if verdict.role == EXPLORATORY]
    return [*told, *([f"Exploratory: {tell_family(explored)}"] if explored else [])]


def list_verdicts(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Verdicts as rows of plain values."""
    return [
        {"role": v.role, "label_a": v.label_a, "label_b": v.label_b, "verdict": v.sentence} | as_row(v.comparison)
        for v in verdicts
    ]
