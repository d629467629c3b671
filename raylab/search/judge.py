"""Whether a trial goes on after a rung, judged from the tables by the trial itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from raylab.job.specs import Job, TrialSpec
from raylab.results.tables import list_summaries
from raylab.store.storage import pull

optuna.logging.set_verbosity(optuna.logging.ERROR)


def decide(spec: TrialSpec, rung: int) -> bool:
    """True to go on. Only trials of a search are ever stopped."""
    if spec.phase != "search" or spec.settings.search.early_stopping == "none":
        return True
    results = Path(spec.results)
    pull(results, spec.job)
    # A file that is damaged is one trial less to compare with; the next resume makes it again.
    return keep_going(spec.settings, list_summaries(results, spec.job, skip_damaged=True), spec.trial_id, rung)


def keep_going(job: Job, rows: Sequence[Mapping[str, Any]], trial_id: str, rung: int) -> bool:
    """Whether a trial may go on after `rung`, by Optuna's successive halving over the arms of the same phase.

    `rows` are those of `trials`, in the order of their start, with each rung's target in `rung_values`; the study is
    replayed from them, so that no process has to be asked.
    """
    if job.search.early_stopping == "none":
        return True
    study = optuna.create_study(
        direction="minimize" if job.search.targets[0].mode == "min" else "maximize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    searched = [row for row in rows if row["phase"] == "search"]
    own = next((row for row in searched if row["trial_id"] == trial_id), None)
    # Arms are compared on one seed, on the data as they are now, and by equal measures at equal budgets: a job that ran
    # before with other rungs or another target says nothing of these.
    same = ("seed", "data_digest", "measures")
    alike = [row for row in searched if own and all(row[name] == own[name] for name in same)]
    others = [row for row in alike if row["trial_id"] != trial_id]
    for row in [*others, *([own] if own else [])]:
        replayed, verdict = study.ask(), False
        values = json.loads(row["rung_values"] or "[]")[: rung if row is own else None]
        for step, value in enumerate(values, start=1):
            if value is not None:
                replayed.report(value, step)
                verdict = replayed.should_prune()
    return not verdict if own else True
