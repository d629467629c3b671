"""The peer of `sweep.py`: the work of a raylab trial as a user would write it for Ray Tune alone."""

import functools
import os
import time
from pathlib import Path
from typing import Any

from raylab.specs import TrialSpec

RUNGS = 3
CPUS = 2


@functools.cache
def open_bare(text: str) -> tuple[TrialSpec, list[Any]]:
    """The spec of the pre-trained trial and its rungs' stages, once a process."""
    from raylab.pretrain import open_data, start_rung, train_rung

    spec = TrialSpec.model_validate_json(text)
    data = open_data(spec)
    stages = [start_rung(spec, data)]
    for rung in range(1, RUNGS + 1):
        stage, _ = train_rung(spec, data, stages[0], stages[-1], rung, None)
        assert stage.reused, "the bare trial must not pre-train"
        stages.append(stage)
    return spec, stages


def run_bare_trial(config: dict[str, Any]) -> None:
    """The same work as a user would write it for Ray Tune: load, score, write, report, three times."""
    from ray import tune

    from raylab.evaluation import evaluate_encoder
    from raylab.trial import set_threads

    spec, stages = open_bare(config["spec"])
    set_threads(1)
    rate = spec.settings.evaluate.fine_tune.model_copy(update={"learning_rate": config["learning_rate"]})
    evaluate = spec.settings.evaluate.model_copy(update={"fine_tune": rate})
    own = spec.model_copy(update={"settings": spec.settings.model_copy(update={"evaluate": evaluate})})
    folder = Path(config["folder"]) / tune.get_context().get_trial_id()
    folder.mkdir(parents=True)
    for rung in range(1, RUNGS + 1):
        found = evaluate_encoder(own, stages[rung], rung)
        (folder / f"{rung}.bin").write_bytes(os.urandom(config["num_bytes"] // RUNGS))
        tune.report({"value": next(row["value"] for row in found.scores if row["metric"] == "f1_macro")})


def run_bare(text: str, folder: Path, num_trials: int, num_bytes: int) -> list[float]:
    """The bare sweep: when each trial ended, in seconds from the start, then the whole."""
    from ray import tune

    started, ends = time.perf_counter(), []

    class Watch(tune.Callback):
        """Notes the time of each end."""

        def on_trial_complete(self, *arguments: Any, **named: Any) -> None:
            ends.append(time.perf_counter() - started)

    found = tune.Tuner(
        tune.with_resources(run_bare_trial, {"CPU": 1}),
        param_space={
            "learning_rate": tune.loguniform(1e-5, 1e-2),
            "spec": text,
            "folder": str(folder / "bytes"),
            "num_bytes": num_bytes,
        },
        tune_config=tune.TuneConfig(num_samples=num_trials, reuse_actors=True, max_concurrent_trials=CPUS),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0, callbacks=[Watch()]),
    ).fit()
    assert not found.errors, found.errors
    assert len(ends) == num_trials, len(ends)
    return [*ends, time.perf_counter() - started]
