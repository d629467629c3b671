"""Ray Tune as the runner of a sweep: it runs what it is given, first in, first out."""

import contextlib
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from raylab.mistakes import Interrupted, JobError
from raylab.settings import dump_spec
from raylab.specs import Job, TrialSpec
from raylab.workers import trial_resources, tune_trial

# How often the sweep looks for living nodes.
NODE_SECONDS = 10

NextTrial = Callable[[], TrialSpec | None]
FinishTrial = Callable[..., None]


class ArmSearcher(Searcher):
    """Gives Tune the trials that `next_trial` names and tells `finish_trial` of their ends."""

    def __init__(self, next_trial: NextTrial, finish_trial: FinishTrial) -> None:
        super().__init__(metric="rung", mode="max")
        self.next_trial, self.finish_trial = next_trial, finish_trial
        self.names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """A trial's spec as Tune's config, None to wait, FINISHED at the end."""
        try:
            spec = self.next_trial()
        except StopIteration:
            return Searcher.FINISHED
        if spec is None:
            return None
        self.names[trial_id] = spec.trial_id
        return {"spec": dump_spec(spec)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Passes the end of a trial on."""
        name = self.names.pop(trial_id, None)
        if name is not None:
            self.finish_trial(name, failed=error or not result)

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        """Nothing: rungs are in the tables."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the tables are the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep is built from the tables."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into a snapshot that is never read here."""
        return {}


class SweepWatch(tune.Callback):
    """Notes Ctrl-C and passes it to Tune, which then ends its trials and returns; and ends a sweep without nodes."""

    def __init__(self) -> None:
        self.interrupted = False
        self.looked = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises Interrupted where no node is left: Tune would wait for one for ever."""
        if time.monotonic() - self.looked > NODE_SECONDS:
            self.looked = time.monotonic()
            if not any(node["Alive"] for node in ray.nodes()):
                raise Interrupted

    def setup(self, *arguments: Any, **named: Any) -> None:
        """Wraps the handler that Tune has set by now."""
        inner = signal.getsignal(signal.SIGINT)

        def handle(number: int, frame: Any) -> None:
            self.interrupted = True
            if callable(inner):
                inner(number, frame)

        # Outside the main thread no signal arrives.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, handle)


@contextlib.contextmanager
def ray_session(job: Job, address: str | None) -> Iterator[None]:
    """Ray started here, or the cluster at `address`, until the block ends.

    Raises JobError where none answers, or where no trial of the job would fit.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address is None:
            # "local": a cluster that happens to run on this machine is not ours to use.
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        kind = type(error).__name__
        raise JobError([f"--address {address}: no Ray cluster answers ({kind}); start it or correct it"]) from None
    try:
        trial_resources(job)
        yield
    finally:
        ray.shutdown()


def run_tune(job: Job, next_trial: NextTrial, finish_trial: FinishTrial) -> None:
    """Runs trials until `next_trial` raises StopIteration, inside a `ray_session`. Raises Interrupted on Ctrl-C."""
    resources, slots = trial_resources(job)
    scratch, before, watch = tempfile.mkdtemp(prefix="raylab-tune-"), signal.getsignal(signal.SIGINT), SweepWatch()
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        tune.Tuner(
            tune.with_resources(tune_trial, resources),
            tune_config=tune.TuneConfig(
                search_alg=ArmSearcher(next_trial, finish_trial),
                num_samples=-1,
                max_concurrent_trials=min(job.resources.max_concurrent_trials or slots, slots),
                reuse_actors=job.resources.workers == 1,
            ),
            run_config=tune.RunConfig(
                name=job.name,
                # Tune's own files: snapshots and results that nothing here reads.
                storage_path=scratch,
                verbose=0,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        ).fit()
    finally:
        signal.signal(signal.SIGINT, before)
        shutil.rmtree(scratch, ignore_errors=True)
    if watch.interrupted:
        raise Interrupted
