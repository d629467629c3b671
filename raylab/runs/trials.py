"""A trial by its id, whichever job ran it, and its encoder, trained again where it is gone."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylab.base.mistakes import BusyError, JobError
from raylab.job.jobs import load_job
from raylab.results.packs import list_folders
from raylab.results.queries import find_job
from raylab.results.tables import list_names, read_trial
from raylab.runs.preparation import find_last_rung, make_spec, prepare
from raylab.runs.trial import set_threads
from raylab.search.search import read_values
from raylab.store.storage import name_results
from raylab.training.pretrain import open_data, start_rung, train_rung
from raylab.training.rungs import list_rungs

BASELINE = "baseline:"
# Or of an arm, whose trials an error then names.
TRIAL_ID = re.compile(r"[0-9a-f]{12}(-[0-9]+)?")


def find_trial(results: Path, trial_id: str, what: str) -> dict[str, Any]:
    """The row of `trials` of a complete trial. Raises JobError, whose lines start with `what`, naming the nearest."""
    found: list[dict[str, Any]] = []
    known: set[str] = set()
    for job in list_folders(results, "trials"):
        known |= {name for name in list_names(results, job, "trials") if not name.startswith("baseline_")}
        row = read_trial(results, job, trial_id)
        found += [] if row is None else [row]
    complete = [row for row in found if row["status"] == "complete"]
    if complete and complete[0]["arm"].startswith(BASELINE):
        raise JobError([f"{what}: {trial_id} is a baseline, it has no encoder"])
    if complete:
        return complete[0]
    if found:
        row = found[0]
        raise JobError([f"{what}: {trial_id} is {row['status']}, not complete; 'raylab resume {row['job']}' goes on"])
    own = sorted(name for name in known if name.startswith(f"{trial_id}-"))
    if own:
        raise JobError([f"{what}: {trial_id} is an arm; name one of its trials: {', '.join(own)}"])
    near = difflib.get_close_matches(trial_id, sorted(known), n=3, cutoff=0.5)
    fix = f"did you mean {', '.join(near)}?" if near else "see: raylab query 'select job, trial_id from trials'"
    raise JobError([f"{what}: no trial '{trial_id}' under {name_results(results)}; {fix}"])


def open_final(results: Path, row: dict[str, Any], tell: Callable[[str], None]) -> Path:
    """The stage folder of a complete trial's final encoder; where it is gone, it is trained again, as `tell` is told.

    Raises JobError where that can't be: its data or its job have changed, or another process trains it.
    """
    folder = find_last_rung(results, row["job"], row["trial_id"])
    if folder is not None:
        return folder
    tell(f"the encoder of {row['trial_id']} is gone from {name_results(results)}; it is trained again")
    preparation = prepare(load_job(find_job(results, row["job"])), results)
    spec = make_spec(preparation, read_values(preparation.job, row), row["seed"], row["phase"])
    if spec.arm != row["arm"]:
        raise JobError([f"{row['trial_id']}: its data or its job have changed since it ran; restore them"])
    set_threads(spec.settings.resources.cpus_per_worker)  # as when it ran: sums keep their order
    data, chain = open_data(spec), list_rungs(spec)
    if len(chain) == 1:
        return start_rung(spec, data).path
    try:
        return train_rung(spec, data, chain, len(chain) - 1, None)[0].path
    except BusyError:
        raise JobError([f"{row['trial_id']}: another process trains it; try again when that has ended"]) from None
