"""A job's trials as TensorBoard runs: settings, training curves, and scores and geometry by rung, from the tables."""

import io
import itertools
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raylab.base.mistakes import JobError
from raylab.job.settings import label_values
from raylab.job.specs import Job
from raylab.measures.definitions import BINS, DEFINITIONS
from raylab.results.queries import open_tables
from raylab.results.tables import SETTING_COLUMNS, list_trials

# Trial, tag, step and value. Validation alone, as the test split is for a job's end; classes and histograms would hide
# the rest. The step is that of training in curves, else the rung.
_POINTS = f"""
    select trial_id, 'curves/' || metric as tag, step, value from curves where job = $job and value is not null
    union all
    select trial_id, concat_ws('/', 'scores', task, metric, 'shots=' || coalesce(shots::varchar, 'full'),
        'frozen_layers=' || frozen_layers, 'probe=' || probe), rung, avg(value)
    from scores where job = $job and split = 'validation' and class is null and value is not null
    group by trial_id, task, metric, shots, frozen_layers, probe, rung
    union all
    select trial_id, concat_ws('/', 'geometry', task, metric || coalesce(' at ' || parameter::varchar, '')), rung, value
    from geometry where job = $job and split = 'validation' and value is not null
        and metric not in ({", ".join(f"'{name}'" for name, of in DEFINITIONS.items() if of.parameter == BINS)})
    order by trial_id, tag, step
"""
ROWS_AT_ONCE = 10_000
Row = Mapping[str, Any]
Point = tuple[str, str, int, float]


def write_runs(results: Path, job: Job, folder: Path) -> int:
    """Writes a run a trial, `folder`/TRIAL_ID, with all that is in the tables now; returns how many.

    Each run is one event file, in whose place the next writing puts another; TensorBoard may be open. Raises JobError
    where the package tensorboard is not there, no trial has begun, or the folder can't be written.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise JobError(["tensorboard: the package is not there; pip install 'raylab[tensorboard]'"]) from None
    trials = {row["trial_id"]: row for row in list_trials(results, job.name) if not row["arm"].startswith("baseline:")}
    if not trials:
        raise JobError([f"tensorboard: {job.name} has no trial yet; run it first"])
    answer = open_tables(results, "curves scores geometry", job.name).execute(_POINTS, {"job": job.name})
    points = itertools.chain.from_iterable(iter(lambda: answer.fetchmany(ROWS_AT_ONCE), []))
    bare = set(trials)
    try:
        for trial_id, found in itertools.groupby(points, key=lambda point: point[0]):
            if trial_id in bare:
                bare.remove(trial_id)
                _write_run(folder / trial_id, _encode_run(job, trials[trial_id], found))
        for trial_id in bare:  # nothing measured yet
            _write_run(folder / trial_id, _encode_run(job, trials[trial_id], ()))
    except OSError as error:
        raise JobError([f"tensorboard: {folder}: {error.strerror}; choose a folder that can be written"]) from None
    return len(trials)


def _encode_run(job: Job, row: Row, points: Iterable[Point]) -> bytes:
    """A trial's events as one file holds them, all at the time at which it began."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.record_writer import RecordWriter

    began = row["started_at"].timestamp()
    searched = {name: row[name] for name in (*job.search.space, "seed") if row[name] is not None}
    events = [
        Event(file_version="brain.Event:2"),
        # Whoever has read an earlier file of the run drops what it said.
        Event(session_log=SessionLog(status=SessionLog.START)),
        Event(summary=hparams_pb(searched, trial_id=row["trial_id"], start_time_secs=began)),
        Event(summary=text_pb("settings", _tell_settings(job, row))),
    ]
    events += [
        Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
        for _, tag, step, value in points
    ]
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    for event in events:
        event.wall_time = began
        writer.write(event.SerializeToString())
    return stream.getvalue()


def _tell_settings(job: Job, row: Row) -> str:
    """What a trial is, and every setting that it reads, as a table in Markdown."""
    label = label_values({name: row[name] for name in job.search.space})
    told = {"arm": row["arm"], "searched": label, "phase": row["phase"], "seed": row["seed"]}
    told |= {name: row[name] for name in SETTING_COLUMNS if row[name] is not None}
    lines = [f"| {name} | {_escape(value)} |" for name, value in told.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


def _escape(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _write_run(run: Path, data: bytes) -> None:
    """Puts an event file in the place of the run's earlier one.

    Readers go on from file to file by name, unless the one that they are in is gone: it is emptied, and stays until
    the next writing.
    """
    run.mkdir(parents=True, exist_ok=True)
    earlier = sorted(run.glob("events.out.tfevents.*"))
    scratch = run / f".writing.{os.getpid()}"
    try:
        scratch.write_bytes(data)
        scratch.replace(run / f"events.out.tfevents.{time.time_ns() // 1000:017d}.raylab")
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    for path in earlier[:-1]:
        path.unlink(missing_ok=True)
    for path in earlier[-1:]:
        os.truncate(path, 0)
