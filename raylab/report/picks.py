"""The encoders that figures of embedding spaces show: the start, the base arm, and the best ranked arm."""

from typing import NamedTuple

from raylab.report.parts import MissingError, Study, name_arm, tell_cell
from raylab.results.ranking import BASELINE, rank_arms

START, BASE, BEST = "start", "base", "best"
FIRST = "best, first rung"


class Pick(NamedTuple):
    """An encoder to be shown: what it is shown as, its arm, and its rung (None: the last)."""

    role: str
    label: str
    arm: str
    rung: int | None = None


def list_best(study: Study) -> list[str]:
    """The ranked arms with a value in the compared cell, best first, without baselines. Raises MissingError."""
    ranked = rank_arms(
        study.results, study.job, study.target.table, study.cell, study.target.mode, study.arms.base or "",
        "validation", list(study.arms.rows),
    )  # fmt: skip
    found = [row.arm for row in ranked if not row.arm.startswith(BASELINE)]
    if not found:
        raise MissingError(f"no ranked arm has a value at {tell_cell(study.cell)}")
    return found


def pick_encoders(study: Study, ranked: list[str]) -> list[Pick]:
    """The start of the best arm, the base arm and the best arm, each once, of arms that are `ranked` best first.

    The start is measured where an arm without pre-training starts from the same encoder; else the best arm after its
    first rung stands for it, where it has several.
    """
    best = ranked[0]
    roles: dict[tuple[str, int | None], list[str]] = {}
    start = find_start(study, best, ranked)
    if start is not None:
        roles[start, None] = [START]
    elif study.arms.rows[best]["num_rungs"] > 1:
        roles[best, 1] = [FIRST]
    if study.arms.base in ranked:
        roles.setdefault((str(study.arms.base), None), []).append(BASE)
    roles.setdefault((best, None), []).append(BEST)
    return [Pick(" and ".join(names), _label(study, arm, names), arm, rung) for (arm, rung), names in roles.items()]


def find_start(study: Study, arm: str, ranked: list[str]) -> str | None:
    """The ranked arm that is another's start, without pre-training."""
    rows = study.arms.rows
    for other in ranked:
        same = all(rows[other][name] == rows[arm][name] for name in rows[arm] if name.startswith("encoder."))
        if same and rows[other]["pretrain.objective"] == "none":
            return other
    return None


def _label(study: Study, arm: str, names: list[str]) -> str:
    role, name = " and ".join(names), name_arm(study, arm)
    return role if name in names else f"{role}: {name}"
