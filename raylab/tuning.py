"""Ray Tune as the runner of a sweep: it runs what it is given, first in, first out."""

import contextlib
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from raylab.mistakes import Interrupted, JobError
from raylab.specs import Job, TrialSpec
from raylab.workers import check_fit, count_slots, pack_spec, trial_resources, tune_trial

# How often the sweep looks at which nodes there are.
NODE_SECONDS = 5


class Runnable(Protocol):
    """What gives the trials and takes their ends: a `schedule.Schedule`."""

    def next_trial(self) -> TrialSpec | None:
        """The next trial, None to wait; raises StopIteration at the end."""

    def finish_trial(self, trial_id: str, end: str) -> None:
        """Takes how a trial ended."""

    def look(self) -> None:
        """Raises Interrupted where the sweep must end at once."""


class ArmSearcher(Searcher):
    """Gives Tune the trials of a sweep, as many as fit on the cluster as it is now, and passes their ends on."""

    def __init__(self, job: Job, sweep: Runnable) -> None:
        super().__init__(metric="rung", mode="max")
        self.job, self.sweep = job, sweep
        self.names: dict[str, str] = {}
        self.slots, self.counted = 0, float("-inf")

    def suggest(self, trial_id: str) -> Any:
        """A trial's spec as Tune's config, None to wait, FINISHED at the end."""
        if len(self.names) >= self._count_slots():
            return None
        try:
            spec = self.sweep.next_trial()
        except StopIteration:
            return Searcher.FINISHED
        if spec is None:
            return None
        self.names[trial_id] = spec.trial_id
        return {"spec": pack_spec(spec)}

    def _count_slots(self) -> int:
        """Nodes come and go: counted again now and then."""
        if time.monotonic() - self.counted > NODE_SECONDS:
            self.counted = time.monotonic()
            self.slots = min(count_slots(self.job), self.job.resources.max_concurrent_trials or 2**31)
        return self.slots

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Passes the end of a trial on."""
        name = self.names.pop(trial_id, None)
        if name is not None:
            self.sweep.finish_trial(name, "died" if error or not result else result["end"])

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
    """Ends a sweep at once on Ctrl-C, on a request to do so, and where no node is left."""

    def __init__(self, sweep: Runnable) -> None:
        self.sweep = sweep
        self.interrupted = False
        self.looked = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises Interrupted, which passes through Tune: its own end of a run waits for every trial."""
        self.sweep.look()
        if time.monotonic() - self.looked > NODE_SECONDS:
            self.looked = time.monotonic()
            if not any(node["Alive"] for node in ray.nodes()):
                raise Interrupted
        if self.interrupted:
            raise Interrupted

    def setup(self, *arguments: Any, **named: Any) -> None:
        """Takes the place of the handler that Tune has set by now; a second Ctrl-C ends whatever is going on."""

        def handle(number: int, frame: Any) -> None:
            if self.interrupted:
                raise Interrupted
            self.interrupted = True

        # Outside the main thread no signal arrives.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, handle)

    def __getstate__(self) -> dict[str, Any]:
        """As the searcher's: pickled, never read."""
        return {}


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
        check_fit(job)
        yield
    finally:
        ray.shutdown()


def run_tune(job: Job, sweep: Runnable) -> None:
    """Runs a sweep's trials to its end, inside a `ray_session`. Raises Interrupted on Ctrl-C.

    Every trial is tried once: the sweep asks for those that should be tried again.
    """
    scratch, before = tempfile.mkdtemp(prefix="raylab-tune-"), signal.getsignal(signal.SIGINT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        tune.Tuner(
            tune.with_resources(tune_trial, trial_resources(job)),
            tune_config=tune.TuneConfig(
                search_alg=ArmSearcher(job, sweep), num_samples=-1, reuse_actors=job.resources.workers == 1
            ),
            run_config=tune.RunConfig(
                name=job.name,
                # Tune's own files: snapshots and results that nothing here reads.
                storage_path=scratch,
                verbose=0,
                callbacks=[SweepWatch(sweep)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()
    finally:
        signal.signal(signal.SIGINT, before)
        shutil.rmtree(scratch, ignore_errors=True)
