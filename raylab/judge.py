"""Whether a trial goes on after a rung, judged from the tables by the trial itself."""

from pathlib import Path

from raylab.search import keep_going
from raylab.specs import TrialSpec
from raylab.tables import read_rows
from raylab.trial import compute_targets


def decide(spec: TrialSpec, rung: int) -> bool:
    """True to go on. Only trials of a search are ever stopped."""
    if spec.phase != "search" or spec.settings.search.early_stopping == "none":
        return True
    results = Path(spec.results)

    def value(trial_id: str, step: int) -> float | None:
        scores, geometry = (read_rows(results, spec.job, table, trial_id) for table in ("scores", "geometry"))
        return compute_targets(spec.settings, scores, geometry, step)[0]

    return keep_going(spec.settings, results, spec.trial_id, value, rung)
