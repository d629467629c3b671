"""A job's report: which sections it has, in the order in which they are read."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

import raylab
from raylab.base.mistakes import JobError
from raylab.job.settings import resolve_target
from raylab.job.specs import Job
from raylab.report.associations import tell_associations
from raylab.report.conclusions import tell_arms, tell_question
from raylab.report.drawing import STYLE
from raylab.report.failures import tell_failures
from raylab.report.grid import tell_grid
from raylab.report.influences import tell_effects
from raylab.report.learning import tell_learning
from raylab.report.maps import tell_maps
from raylab.report.origins import tell_cost, tell_hygiene, tell_provenance
from raylab.report.page import write_page
from raylab.report.parts import MissingError, Section, Study
from raylab.report.searches import tell_search
from raylab.report.shapes import tell_shapes
from raylab.report.surfaces import tell_spans
from raylab.results.queries import hold_tables
from raylab.statistics.analysis import default_target, list_arms

SECTIONS: dict[str, Callable[[Study], Section]] = {
    "question": tell_question,
    "arms": tell_arms,
    "grid": tell_grid,
    "effects": tell_effects,
    "importances": tell_search,
    "spans": tell_spans,
    "learning": tell_learning,
    "maps": tell_maps,
    "shapes": tell_shapes,
    "failures": tell_failures,
    "associations": tell_associations,
    "hygiene": tell_hygiene,
    "cost": tell_cost,
    "provenance": tell_provenance,
}


def write_report(results: Path, job: Job, folder: Path) -> Path:
    """Writes the report of a job into a folder; gives its page. All from the tables and kept stages, no document text.

    Raises JobError where no arm has run to the end yet, or the folder holds something else.
    """
    with hold_tables(), matplotlib.rc_context(STYLE):
        return _write_sections(results, job, folder)


def _write_sections(results: Path, job: Job, folder: Path) -> Path:
    target = default_target(job)
    study = Study(results, job, target, resolve_target(job, target), list_arms(results, job))
    if not study.arms.rows:
        raise JobError([f"report: no arm of {job.name} has run to the end yet; 'raylab status {job.name}' tells more"])
    sections, left_out = [], []
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    for name, tell in SECTIONS.items():
        try:
            sections.append(tell(study))
        except MissingError as reason:
            left_out.append(f"{name.capitalize()}: {reason}.")
    if left_out:
        sections.append(Section("left-out", "Not in this report", (), left_out))
    return write_page(sections, f"{job.name}: report", f"raylab {raylab.__version__}, {now}", folder)
