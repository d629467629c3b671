"""What is wrong with an arm's embeddings: signatures of failure by stated rules, with the numbers they rest on.

All from the tables: means over the complete trials of an arm, at the last rung, on validation.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raylab.base.mistakes import JobError
from raylab.job.settings import SETTINGS, label_values
from raylab.measures.definitions import DEFINITIONS
from raylab.results.queries import find_job, open_tables

if TYPE_CHECKING:
    import duckdb

# The most that a collapsed space keeps of what Gaussian vectors have.
COLLAPSED_RANK = 0.1
COLLAPSED_UNIFORMITY = 0.05
# The least that an even space has of the uniformity of Gaussian vectors, and the most that its classes stand out.
EVEN_UNIFORMITY = 0.8
CHANCE_PURITY = 0.1
CHANCE_SILHOUETTE = 0.02
FRAGMENT_SHARE = 0.5
CLASS_PIECES = 0.5
POOR_GAIN = 0.5


class Signature(NamedTuple):
    """A rule, the numbers it needs (all of an arm and a task) and whether they break it."""

    rule: str
    needs: tuple[str, ...]
    holds: Callable[[Mapping[str, float]], bool]


SIGNATURES = {
    "collapse": Signature(
        f"RankMe at most {COLLAPSED_RANK:g} of that of Gaussian vectors, or uniformity at most "
        f"{COLLAPSED_UNIFORMITY:g} of theirs",
        ("rankme", "rankme_gaussian", "uniformity", "uniformity_gaussian"),
        lambda v: (
            v["rankme"] <= COLLAPSED_RANK * v["rankme_gaussian"]
            or v["uniformity"] >= COLLAPSED_UNIFORMITY * v["uniformity_gaussian"]
        ),
    ),
    "spread out but not clustered": Signature(
        f"uniformity at least {EVEN_UNIFORMITY:g} of that of Gaussian vectors, while k-NN purity gains at most "
        f"{CHANCE_PURITY:g} of what is left above shuffled labels, and silhouette at most {CHANCE_SILHOUETTE:g}",
        ("uniformity", "uniformity_gaussian", "knn_purity", "knn_purity_shuffled", "silhouette", "silhouette_shuffled"),
        lambda v: (
            v["uniformity"] <= EVEN_UNIFORMITY * v["uniformity_gaussian"]
            and v["knn_purity"] - v["knn_purity_shuffled"] <= CHANCE_PURITY * (1 - v["knn_purity_shuffled"])
            and v["silhouette"] - v["silhouette_shuffled"] <= CHANCE_SILHOUETTE
        ),
    ),
    "graph in fragments": Signature(
        f"at the largest density measured, under {FRAGMENT_SHARE:g} of the points in the largest component, and under "
        f"{FRAGMENT_SHARE:g} of what Gaussian vectors have there; assortativity by class "
        f"is under {CLASS_PIECES:g}",
        ("density_largest_share", "density_largest_share_gaussian", "density_assortativity"),
        lambda v: (
            v["density_largest_share"] < FRAGMENT_SHARE * min(1.0, v["density_largest_share_gaussian"])
            and v["density_assortativity"] < CLASS_PIECES
        ),
    ),
    "poor probe despite training": Signature(
        "held-out MLM loss ended below the unigram entropy, while the best probe's macro F1 at the most shots is at "
        f"most {POOR_GAIN:g} of the way from the majority baseline to TF-IDF",
        ("heldout_mlm_loss", "heldout_unigram_entropy", "f1_macro", "f1_macro_majority", "f1_macro_tfidf"),
        lambda v: (
            v["heldout_mlm_loss"] < v["heldout_unigram_entropy"]
            and v["f1_macro"]
            <= v["f1_macro_majority"] + POOR_GAIN * max(0.0, v["f1_macro_tfidf"] - v["f1_macro_majority"])
        ),
    ),
}


def diagnose_job(results: Path, name: str) -> list[dict[str, Any]]:
    """A row for each arm, task and signature: whether it was found, its rule and its evidence.

    `found` is null where numbers are missing (references turned off, a table of an older raylab), which `missing`
    lists. Raises JobError for an unknown job, or one without a complete trial.
    """
    find_job(results, name)
    connection = open_tables(results, "trials geometry scores curves", name)
    numbers = _read_numbers(connection)
    if not numbers:
        raise JobError([f"diagnose: {name} has no complete trial with geometry yet; run it first"])
    rows, labels = [], _label_arms(connection)
    for (arm, task), values in sorted(numbers.items()):
        for signature, (rule, needs, holds) in SIGNATURES.items():
            known = {need: values[need] for need in needs if not math.isnan(values.get(need, math.nan))}
            missing = [need for need in needs if need not in known]
            found = None if missing else holds(known)
            rows.append(
                {"arm": arm, "settings": labels[arm], "task": task, "signature": signature, "found": found,
                 "evidence": known, "rule": rule, "missing": missing}
            )  # fmt: skip
    return rows


def _read_numbers(connection: "duckdb.DuckDBPyConnection") -> dict[tuple[str, str], dict[str, float]]:
    """(arm, task) -> name -> number. The names are those that SIGNATURES need."""
    condition = "s.split = 'validation' and s.rung = t.num_rungs and t.status = 'complete'"
    found: dict[tuple[str, str], dict[str, float]] = {}
    # Of the metrics with several parameters the largest counts: the last row of each wins.
    asked = connection.execute(
        f"""
        select t.arm, s.task, s.metric, avg(s.value), avg(s.reference)
        from geometry s join trials t using (job, trial_id) where {condition}
        group by t.arm, s.task, s.metric, s.parameter order by s.parameter
        """
    )
    for arm, task, metric, value, reference in asked.fetchall():
        if metric not in DEFINITIONS:  # of another version
            continue
        kind = "shuffled" if DEFINITIONS[metric].reference == "labels" else "gaussian"
        numbers = found.setdefault((arm, task), {})
        numbers[metric] = math.nan if value is None else value
        numbers[f"{metric}_{kind}"] = math.nan if reference is None else reference
    ends = connection.execute(
        """
        with last as (select job, trial_id, s.metric, arg_max(s.value, s.step) as value from curves s
                      where s.metric like 'heldout%' group by all)
        select t.arm, s.metric, avg(s.value) from last s join trials t using (job, trial_id)
        where t.status = 'complete' group by all
        """
    )
    heldout = {(arm, metric): value for arm, metric, value in ends.fetchall()}
    scores = connection.execute(
        f"""
        select t.arm, s.task, coalesce(s.shots, 1e9) as shots, s.probe, avg(s.value)
        from scores s join trials t using (job, trial_id)
        where {condition} and s.metric = 'f1_macro' and (s.frozen_layers = 'all' or t.arm like 'baseline:%')
        group by all having avg(s.value) is not null order by shots, 5
        """
    )
    last: dict[tuple[str, str], tuple[float, float]] = {}
    for arm, task, shots, _, value in scores.fetchall():
        last[arm, task] = (shots, value)
    for (arm, task), numbers in found.items():
        shots, numbers["f1_macro"] = last.get((arm, task), (math.nan, math.nan))
        for baseline in ("majority", "tfidf"):
            its_shots, value = last.get((f"baseline:{baseline}", task), (math.nan, math.nan))
            numbers[f"f1_macro_{baseline}"] = value if its_shots == shots else math.nan
        for metric in ("heldout_mlm_loss", "heldout_unigram_entropy"):
            numbers[metric] = heldout.get((arm, metric), math.nan)
    return found


def _label_arms(connection: "duckdb.DuckDBPyConnection") -> dict[str, str]:
    """What sets each arm apart for people: settings in which the arms that read them differ."""
    columns = ", ".join(f'any_value("{setting}")' for setting in SETTINGS)
    rows = connection.execute(
        f"select arm, {columns} from trials where status = 'complete' and arm not like 'baseline:%' group by arm"
    ).fetchall()
    differ = [index for index in range(len(SETTINGS)) if len({row[index + 1] for row in rows} - {None}) > 1]
    names = list(SETTINGS)
    return {row[0]: label_values({names[index]: row[index + 1] for index in differ}) for row in rows}
