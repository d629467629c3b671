"""The peer of `sweep.py`: the work of a raylab trial as a user would write it for Ray Tune alone."""

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

from raylab.job.specs import TrialSpec

RUNGS = 3
CPUS = 2


@functools.cache
def open_bare(text: str) -> tuple[TrialSpec, list[Path], list[Path]]:
    """The spec of the pre-trained trial, its rungs' encoders and their embeddings, once a process."""
    from raylab.results.tables import read_rows
    from raylab.store.stages import FOLDER
    from raylab.training.rungs import list_rungs

    spec = TrialSpec.model_validate_json(text)
    root = Path(spec.results) / FOLDER
    kept = [row["stage_id"] for row in read_rows(Path(spec.results), spec.job, "stages", spec.trial_id)]
    embedded = [root / stage_id for stage_id in kept if stage_id.startswith("embed-")]
    of = {json.loads((path / "stage.json").read_text())["key"]["encoder"]: path for path in embedded}
    rungs = [link.stage_id for link in list_rungs(spec)[1:]]
    return spec, [root / rung for rung in rungs], [of[rung] for rung in rungs]


def open_bare_states(folder: str, spec: TrialSpec, encoder: str, model: Any, store: Any, rows: Any, depth: str) -> Any:
    """Hidden states at a freeze depth, kept in the sweep's folder as a user would keep them."""
    from raylab.data.tokens import Vocabulary
    from raylab.evaluation.activations import keep_states, open_states
    from raylab.store.stages import FOLDER, read_info

    vocabulary = Vocabulary(**read_info(Path(spec.results) / FOLDER / spec.tokenizer))
    key = {"encoder": encoder, "rows": rows.tolist()}
    corpus = spec.settings.corpus
    kept = keep_states(Path(folder), key, lambda: model, store, rows, vocabulary, corpus, [depth])
    return open_states(kept.path, depth)


def run_bare_trial(config: dict[str, Any]) -> None:
    """The same work as a user would write it for Ray Tune: load, score, write, report, three times."""
    import numpy as np
    from ray import tune

    from raylab.evaluation.evaluation import measure_task
    from raylab.runs.trial import set_threads
    from raylab.training.encoder import choose_device, load_encoder

    spec, rungs, embedded = open_bare(config["spec"])
    set_threads(1)
    rate = spec.settings.evaluate.fine_tune.model_copy(update={"learning_rate": config["learning_rate"]})
    evaluate = spec.settings.evaluate.model_copy(update={"fine_tune": rate})
    own = spec.model_copy(update={"settings": spec.settings.model_copy(update={"evaluate": evaluate})})
    folder = Path(config["folder"]) / tune.get_context().get_trial_id()
    folder.mkdir(parents=True)
    (task,) = spec.settings.evaluate.tasks
    for rung, (stage, embeddings) in enumerate(zip(rungs, embedded, strict=True), start=1):
        model = load_encoder(str(stage / "encoder"))[0].to(choose_device()).eval()
        x = np.load(embeddings / "embeddings.npy", mmap_mode="r")
        open_states_of = functools.partial(open_bare_states, config["folder"], own, stage.name, model)
        found = measure_task(own, task, lambda model=model: model, lambda store, rows, x=x: x, open_states_of)
        (folder / f"{rung}.bin").write_bytes(os.urandom(config["num_bytes"] // RUNGS))
        tune.report({"value": next(row["value"] for row in found["scores"] if row["metric"] == "f1_macro")})


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
