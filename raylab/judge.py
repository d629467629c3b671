"""Whether a trial goes on after a rung, judged from the tables by the trial itself."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import optuna

from raylab.specs import Job, TrialSpec
from raylab.storage import pull
from raylab.tables import list_trials, read_rows, read_trial
from raylab.trial import compute_targets

optuna.logging.set_verbosity(optuna.logging.ERROR)


def decide(spec: TrialSpec, rung: int) -> bool:
    """True to go on. Only trials of a search are ever stopped."""
    if spec.phase != "search" or spec.settings.search.early_stopping == "none":
        return True
    results = Path(spec.results)
    pull(results, spec.job)

    @functools.cache
    def settings(trial_id: str) -> Job:
        """What a trial was measured with: where freeze depths are searched, every arm has its own."""
        row, evaluate = read_trial(results, spec.job, trial_id) or {}, spec.settings.evaluate
        own = {name: row.get(f"evaluate.{name}") for name in ("shots", "frozen_layers", "probes")}
        changed = {name: tuple(json.loads(cell)) for name, cell in own.items() if cell is not None}
        return spec.settings.model_copy(update={"evaluate": evaluate.model_copy(update=changed)})

    def value(trial_id: str, step: int) -> float | None:
        scores, geometry = (read_rows(results, spec.job, table, trial_id) for table in ("scores", "geometry"))
        return compute_targets(settings(trial_id), scores, geometry, step)[0]

    return keep_going(spec.settings, results, spec.trial_id, value, rung)


def keep_going(job: Job, results: Path, trial_id: str, values: Callable[[str, int], float | None], rung: int) -> bool:
    """Whether a trial may go on after `rung`, by Optuna's successive halving over the arms of the same phase.

    `values(trial_id, rung)` reads a trial's target at a rung from the tables; the study is replayed from them, so that
    no process has to be asked.
    """
    if job.search.early_stopping == "none":
        return True
    target = job.search.targets[0]
    study = optuna.create_study(
        direction="minimize" if target.mode == "min" else "maximize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    rows = [row for row in list_trials(results, job.name) if row["phase"] == "search"]
    own = next((row for row in rows if row["trial_id"] == trial_id), None)
    # Arms are compared on one seed and on the data as they are now.
    alike = [row for row in rows if own and (row["seed"], row["data_digest"]) == (own["seed"], own["data_digest"])]
    others = [row for row in alike if row["trial_id"] != trial_id]
    for name, last in [*((row["trial_id"], row["rung"]) for row in others), (trial_id, rung)]:
        replayed, verdict = study.ask(), False
        for step in range(1, last + 1):
            value = values(name, step)
            if value is not None:
                replayed.report(value, step)
                verdict = replayed.should_prune()
    return not verdict
