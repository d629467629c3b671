"""Ray Tune as the runner of a sweep: it runs what it is given, first in, first out."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.search import Searcher

from raylab.base.mistakes import Interrupted, JobError
from raylab.job.specs import Job, TrialSpec
from raylab.runs.workers import check_fit, count_slots, gpus_per_worker, pack_spec, trial_resources

# How often the sweep looks at which nodes there are, and at whether the Ray that it runs on is alive.
NODE_SECONDS, ALIVE_SECONDS = 5, 0.5
# A cluster's head may be silent for so long: less than the minute after which Ray ends the process by itself.
SILENT_SECONDS = 40


# (name, used, total)
Usage = list[tuple[str, float, float]]


class Runnable(Protocol):
    """What gives the trials and takes their ends: a `schedule.Schedule`.

    `why` says why no more trials start, `gpus` how many GPUs a trial holds.
    """

    why: str | None
    gpus: float

    def next_trial(self) -> TrialSpec | None:
        """The next trial, None to wait; raises StopIteration at the end."""

    def finish_trial(self, trial_id: str, end: str) -> None:
        """Takes how a trial ended."""

    def look(self) -> None:
        """Raises Interrupted where the sweep must end at once."""


class Finished(Exception):  # noqa: N818 -- no error: the end of a sweep
    """All trials of a sweep have ended."""


class ArmSearcher(Searcher):
    """Gives Tune the trials of a sweep, as many as fit on the cluster as it is now, and passes their ends on."""

    def __init__(self, job: Job, sweep: Runnable) -> None:
        super().__init__(metric="rung", mode="max")
        self.job, self.sweep = job, sweep
        self.gpus = gpus_per_worker(job)
        sweep.gpus = self.gpus * job.resources.workers
        self.names: dict[str, str] = {}
        self.slots, self.counted = 0, float("-inf")
        self.finished = self.interrupted = False

    def suggest(self, trial_id: str) -> Any:
        """A trial's spec as Tune's config, None to wait, FINISHED at the end."""
        # Without a trial that runs, Tune asks here for minutes and nowhere else.
        self.look()
        if self.sweep.why is not None:
            self.finished = True
            return Searcher.FINISHED
        if len(self.names) >= self._count_slots():
            return None
        try:
            spec = self.sweep.next_trial()
        except StopIteration:
            self.finished = True
            return Searcher.FINISHED
        if spec is None:
            return None
        self.names[trial_id] = spec.trial_id
        return {"spec": pack_spec(spec)}

    def look(self) -> None:
        """Raises Interrupted on Ctrl-C, or where the sweep must end at once."""
        self.sweep.look()
        if self.interrupted:
            raise Interrupted

    def _count_slots(self) -> int:
        """Nodes come and go: counted again now and then."""
        if time.monotonic() - self.counted > NODE_SECONDS:
            self.counted = time.monotonic()
            fit = count_slots(self.job, self.gpus)
            # Tune keeps one process at most for the next trial, unless one waits: then a trial's end costs no process.
            fit += fit > 1 and self.job.resources.workers == 1
            self.slots = min(fit, self.job.resources.max_concurrent_trials or fit)
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
    """Ends a sweep at once on Ctrl-C, on a request to do so, where no node is left, and when all trials have ended."""

    def __init__(self, sweep: Runnable, searcher: ArmSearcher) -> None:
        self.sweep, self.searcher = sweep, searcher
        self.looked = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises Interrupted, which passes through Tune: its own end of a run waits for every trial."""
        self.searcher.look()
        if time.monotonic() - self.looked > NODE_SECONDS:
            self.looked = time.monotonic()
            if not any(node["Alive"] for node in ray.nodes()):
                raise Interrupted

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises Finished: Tune's own end writes and reads again all that it knows of every trial, for nobody."""
        if self.searcher.finished and not any(trial.status == trial.RUNNING for trial in trials):
            # Those that were handed out, and for which no node has room, never began.
            for trial_id in list(self.searcher.names):
                self.searcher.on_trial_complete(trial_id, {"end": "done"})
            raise Finished

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune keeps every trial to the end: of thousands, their specs and results would fill the driver's memory."""
        trial.config, trial.evaluated_params = {}, {}
        trial.run_metadata.metric_analysis, trial.run_metadata.metric_n_steps = {}, {}
        trial.run_metadata.last_result = {"rung": 1}

    on_trial_error = on_trial_complete

    def setup(self, *arguments: Any, **named: Any) -> None:
        """Takes the place of the handler that Tune has set by now; a second Ctrl-C ends whatever is going on."""

        def handle(number: int, frame: Any) -> None:
            if self.searcher.interrupted:
                raise Interrupted
            self.searcher.interrupted = True

        # Outside the main thread no signal arrives.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, handle)

    def __getstate__(self) -> dict[str, Any]:
        """As the searcher's: pickled, never read."""
        return {}


@contextlib.contextmanager
def ray_session(job: Job, address: str | None, tell_lost: Callable[[str], None]) -> Iterator[Callable[[], Usage]]:
    """Ray started here, or the cluster at `address`, until the block ends; gives what reads how much of it is in use.

    Raises JobError where none answers, or where no trial of the job would fit. Where Ray dies under it, `tell_lost` is
    told so and the process ends with code 1: a call to a Ray that is gone may block for a minute.
    """
    reading = threading.Lock()

    def read() -> Usage:
        with reading:
            return read_usage()

    if ray.is_initialized():
        yield read
        return
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            # "local": a cluster that happens to run on this machine is not ours to use.
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        kind = type(error).__name__
        if address is None:
            raise JobError([f"Ray can't be started here ({kind}); 'raylab run --here' does without it"]) from None
        raise JobError([f"--address {address}: no Ray cluster answers ({kind}); start it or correct it"]) from None
    # Ray has set a handler of its own.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, on_sigterm)
    ended = threading.Event()
    threading.Thread(target=_watch_ray, args=(address, ended, tell_lost), daemon=True).start()
    try:
        check_fit(job)
        yield read
    finally:
        ended.set()
        with reading:
            ray.shutdown()


def _watch_ray(address: str | None, ended: threading.Event, tell_lost: Callable[[str], None]) -> None:
    """Ends the process once the Ray below it is gone. Apart from the main thread: that one may be in a call to Ray."""
    node = ray._private.worker._global_node
    # Ray's own processes, where it was started here, and those that the raylet has started: trials among them.
    processes = {kind: infos[0].process for kind, infos in node.all_processes.items()} if address is None else {}
    children: list[int] = []
    host, _, port = node.gcs_address.rpartition(":")
    heard = time.monotonic()
    while not ended.wait(NODE_SECONDS if address else ALIVE_SECONDS):
        if address is None:
            dead = [kind for kind in ("raylet", "gcs_server") if processes[kind].poll() is not None]
            why = f"the Ray node here died ({dead[0]})" if dead else ""
            children = _list_children(processes["raylet"].pid) or children
        else:
            with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), NODE_SECONDS):
                heard = time.monotonic()
            silent = time.monotonic() - heard
            why = f"the head of the cluster at {address} does not answer" if silent > SILENT_SECONDS else ""
        if why and not ended.is_set():
            for pid in (*(process.pid for process in processes.values() if process.poll() is None), *children):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            tell_lost(why)
            os._exit(1)


def _list_children(pid: int) -> list[int]:
    """The processes that a process has started; none where the system does not say."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, file.read_text().split())
    return found


def read_usage() -> Usage:
    """Name, number in use and total of the cluster's GPUs and CPUs; of GPUs only where there are any."""
    if not ray.is_initialized():
        return []
    total, free = ray.cluster_resources(), ray.available_resources()
    return [(name, total[name] - free.get(name, 0.0), total[name]) for name in ("GPU", "CPU") if total.get(name)]


def _leave_starting(controller: Any, trial: Any, reuse: Any = TuneController._maybe_reuse_cached_actor) -> bool:
    """Takes the place of Tune's method that gives a waiting trial a process which has become free.

    Tune's own ends the process that starts for that trial, again and again where trials end faster than processes
    start: nodes that join such a sweep would never be used.
    """
    actor = controller._trial_to_actor.get(trial)
    starts = actor is not None and controller._actor_manager.is_actor_started(actor)
    return not starts and reuse(controller, trial)


TuneController._maybe_reuse_cached_actor = _leave_starting


def run_tune(job: Job, sweep: Runnable) -> None:
    """Runs a sweep's trials to its end, inside a `ray_session`. Raises Interrupted on Ctrl-C.

    Every trial is tried once: the sweep asks for those that should be tried again.
    """

    def run(config: dict[str, Any]) -> None:
        # Imported by the trial, not by its process as it starts: that takes seconds, and once another process is free,
        # Tune ends those that start. Where trials are short, it would never come to more than one process.
        from raylab.runs.workers import tune_trial

        tune_trial(config)

    scratch, before = tempfile.mkdtemp(prefix="raylab-tune-"), signal.getsignal(signal.SIGINT)
    # What became of a trial is in the tables and the display; Tune would show a traceback, with the error's message.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    searcher = ArmSearcher(job, sweep)
    try:
        tune.Tuner(
            tune.with_resources(run, trial_resources(job)),
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, reuse_actors=job.resources.workers == 1),
            run_config=tune.RunConfig(
                name=job.name,
                # Tune's own files: snapshots and results that nothing here reads.
                storage_path=scratch,
                verbose=0,
                callbacks=[SweepWatch(sweep, searcher)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()
    except Finished:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
        shutil.rmtree(scratch, ignore_errors=True)
