"""The encoders that figures of embedding spaces show: the start, the base arm, and the best ranked arm."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from raylab.job.settings import SETTINGS
from raylab.report.parts import MissingError, Study, name_arm, tell_cell
from raylab.results.queries import open_tables
from raylab.results.ranking import BASELINE, rank_arms

START, BASE, BEST = "start", "base", "best"
FIRST = "best, at its first rung"
SEARCHED = "searched, not confirmed"


class Pick(NamedTuple):
    """An encoder to be shown: as what, what sets its arm apart, its arm, and its rung (None: the last)."""

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

    The start is measured where an arm without pre-training starts from the same encoder, ranked or only searched; else
    the best arm after its first rung stands for it, where it has several.
    """
    best = ranked[0]
    roles: dict[tuple[str, int | None], list[str]] = {}
    start = find_start(study, best)
    if start is not None:
        roles[start, None] = [START]
    elif study.arms.rows[best]["num_rungs"] > 1:
        roles[best, 1] = [FIRST]
    if study.arms.base in ranked:
        roles.setdefault((str(study.arms.base), None), []).append(BASE)
    roles.setdefault((best, None), []).append(BEST)
    return [
        Pick(" and ".join(names), name_arm(study, arm) if arm in study.arms.rows else SEARCHED, arm, rung)
        for (arm, rung), names in roles.items()
    ]


def find_start(study: Study, arm: str) -> str | None:
    """The arm that is another's start, without pre-training: a ranked one, else one with a complete trial."""
    own = study.arms.rows[arm]
    settings = {name: own[name] for name in SETTINGS if name.startswith("encoder.")}
    alike = " and ".join(f'"{name}" is not distinct from ?' for name in settings)
    rows = open_tables(study.results, "trials", study.job.name).execute(
        f"""
        select distinct arm from trials
        where job = ? and status = 'complete' and "pretrain.objective" = 'none' and {alike}
            and arm not like '{BASELINE}%' order by arm
        """,
        [study.job.name, *settings.values()],
    ).fetchall()  # fmt: skip
    found = [name for (name,) in rows]
    return next((name for name in found if name in study.arms.rows), next(iter(found), None))


def tell_picks(picks: Sequence[Pick]) -> str:
    """What the shown encoders are, in a sentence."""
    known: set[str] = set()
    told: list[str] = []
    for pick in reversed(picks):
        said = pick.label in pick.role or pick.label in known
        told.insert(0, pick.role if said else f"{pick.role} ({pick.label})")
        known.add(pick.label)
    missing = "" if any(START in pick.role for pick in picks) else (
        " The start was not measured: an arm with pretrain.objective none does that."
    )  # fmt: skip
    return f"Shown: {'; '.join(told)}.{missing}"


def write_title(role: str, label: str, panels: int) -> str:
    """A panel's title where so many panels stand side by side: the role, and under it what sets the arm apart."""
    if label in role:
        return role
    lines = textwrap.wrap(label, 88 // panels, break_long_words=True)
    return "\n".join([role, *lines[:3]]) + (" ..." if len(lines) > 3 else "")
