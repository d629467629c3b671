"""The rate at which a job would train: of its own trials, of like trials of other jobs, or tried out here."""

import contextlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raylab.base.identity import canonical
from raylab.base.mistakes import DamagedError, InfeasibleError, JobError
from raylab.job.blocks import WIDE
from raylab.job.jobs import load_job
from raylab.job.settings import list_settings, possible_values, with_settings
from raylab.job.specs import Job, Resources
from raylab.results.queries import open_tables
from raylab.results.snapshot import read_table
from raylab.results.tables import plain_value
from raylab.runs.preparation import Preparation, make_spec
from raylab.store.stages import build_stage

# Settings of which the rate of a step depends most: equal ones are told by the same rate. See `make_key`.
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LIKE = (
    *("pretrain.objective", "pretrain.precision"),
    *("encoder.pretrained", "encoder.trial", "encoder.tokenizer.vocab_size"),
    *(f"encoder.config.{name}" for name in SHAPE),
)
# Trials that a rate is taken from, the last ones.
MOST_TRIALS = 20
# Seconds in which all is tried out, and arms of a kind that are tried until one works.
TRY_SECONDS, TRY_ARMS = 1.0, 8

Key = tuple[Any, ...]


class Work(NamedTuple):
    """Tokens to train on of one arm: its settings, the searched values that make it, and its longest pre-training."""

    job: Job
    values: Mapping[str, Any]
    tokens: float
    longest: int


class Rate(NamedTuple):
    """Tokens a second of one trial, over all its workers, and where that is from; None: not known, and why."""

    tokens_per_second: float | None
    source: str


def share_work(job: Job, tokens: int) -> list[Work]:
    """The work of a search, as if each objective that it can choose took an equal share."""
    parts: list[tuple[Job, dict[str, Any]]] = []
    for objective in sorted(possible_values(job, "pretrain.objective") - {"none"}):
        values = {"pretrain.objective": objective} if objective != job.pretrain.objective else {}
        with contextlib.suppress(JobError):  # beside the job's other settings
            parts.append((with_settings(job, values), values))
    return [Work(arm, values, tokens / len(parts), job.pretrain.num_tokens) for arm, values in parts if tokens]


def plan_time(preparation: Preparation, work: Sequence[Work], trials_left: int) -> dict[str, Any]:
    """Hours of pre-training and evaluation that are left, in trial time and on the clock. Plain values.

    `rates`: objective, encoder, tokens a second and where that is from. `tokens_per_second` is over all that is left;
    it and the hours are None where a rate is not known. `evaluation_hours`: None before a trial of the job has ended.
    """
    job, results = preparation.job, preparation.results
    rates = find_rates(preparation, work)
    known = [rates[_make_key(part.job)].tokens_per_second for part in work]
    seconds = longest = 0.0
    for part, rate in zip(work, known, strict=True):
        if rate is not None:
            seconds, longest = seconds + part.tokens / rate, max(longest, part.longest / rate)
    whole, tokens = None not in known, sum(part.tokens for part in work)
    slots, why = count_slots(job)
    trial_seconds, num_trials = _measure_evaluation(results, job.name)
    evaluating = None if trial_seconds is None else trial_seconds * trials_left
    clock = max((seconds + (evaluating or 0.0)) / max(min(slots, trials_left), 1), longest)
    return {
        "rates": [
            {"objective": key[0], "encoder": _tell_encoder(key), "tokens_per_second": rate, "source": source}
            for key, (rate, source) in rates.items()
        ],
        "tokens_per_second": tokens / seconds if whole and seconds else None,
        "hours": seconds / 3600 if whole else None,
        "evaluation_hours": None if evaluating is None else evaluating / 3600,
        "evaluation_source": f"the median of {num_trials} trials of this job" if num_trials else None,
        "trials_at_once": slots,
        "trials_at_once_source": why,
        "clock_hours": clock / 3600 if whole else None,
    }


def tell_time(found: Mapping[str, Any]) -> list[str]:
    """The time that `plan_time` found, in lines for people."""
    lines, evaluating = [], found["evaluation_hours"]
    if found["hours"] is not None:
        lines.append(
            f"time: about {_tell(found['hours'])} of pre-training"
            + (f" and {_tell(evaluating)} of evaluation" if evaluating is not None else "")
            + f" in trials; {_tell(found['clock_hours'])} on the clock with {found['trials_at_once']} at once "
            f"({found['trials_at_once_source']})"
        )
    for rate in found["rates"]:
        told = "no rate is known" if rate["tokens_per_second"] is None else f"{rate['tokens_per_second']:,.0f} tokens/s"
        lines.append(f"rate: {rate['objective']}, {rate['encoder']}: {told} ({rate['source']})")
    if evaluating is None:
        lines.append("evaluation is left out of the time: no trial of this job has ended yet")
    else:
        lines.append(f"evaluation: from {found['evaluation_source']}")
    return lines


def _tell(hours: float) -> str:
    for unit, size in (("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= size:
            return f"{hours / size:.1f} {unit}"
    return f"{hours * 3600:.0f} seconds"


def make_key(settings: Mapping[str, Any], gpu: bool) -> Key:
    """What of an arm its rate is told by, on a GPU or not: of its settings `LIKE`, the precision resolved.

    On a processor the precision of wide encoders stays auto: as the machine has it.
    """
    found = {name: plain_value(settings[name]) for name in LIKE}
    if found["pretrain.precision"] == "auto" and (gpu or (found["encoder.config.hidden_size"] or WIDE) < WIDE):
        found["pretrain.precision"] = "bfloat16" if gpu else "float32"
    return tuple(found.values())


def _make_key(job: Job) -> Key:
    return make_key(list_settings(job), _wants_gpu(job))


def _tell_encoder(key: Key) -> str:
    named = dict(zip(LIKE, key, strict=True))
    start = named["encoder.pretrained"] or named["encoder.trial"]
    return str(start or f"{named['encoder.config.num_hidden_layers']} x {named['encoder.config.hidden_size']}")


def count_slots(job: Job) -> tuple[int, str]:
    """Trials that run at once, and by what: as the job says, else as many as one GPU and this machine's CPUs hold.

    Where there is no GPU here, the CPUs beside one aren't known.
    """
    resources, where = job.resources, "a cluster may hold more"
    if resources.max_concurrent_trials is not None:
        return resources.max_concurrent_trials, "resources.max_concurrent_trials"
    fit = (os.cpu_count() or 1) // (resources.cpus_per_worker * resources.workers)
    if _wants_gpu(job):
        beside = int(1 / (resources.gpus_per_worker or 1.0) + 1e-6)
        if beside <= fit or not _has_gpu():
            return max(beside, 1), f"as many as fit on one GPU; {where}"
    return max(fit, 1), f"as many as fit on this machine; {where}"


def find_rates(preparation: Preparation, work: Iterable[Work]) -> dict[Key, Rate]:
    """The rate of each kind of arm, by `make_key`: measured in trials where there are any, else tried out here."""
    job, results = preparation.job, preparation.results
    kinds: dict[Key, dict[str, Work]] = {}  # the arms of each
    for part in work:
        kinds.setdefault(_make_key(part.job), {}).setdefault(canonical(part.values), part)
    found: dict[Key, Rate] = {}
    for name in (job.name, None):  # of other jobs only what this one's trials don't tell
        missing = [key for key in kinds if key not in found]
        trials = _list_trials(results, name) if missing and results.is_dir() else []
        trials = [row for row in trials if _fits_device(job, row["device"])]
        for key in missing:
            settings = list_settings(next(iter(kinds[key].values())).job)
            keys = {gpu: make_key(settings, gpu) for gpu in (False, True)}
            like = [row for row in trials if row["key"] == keys[_is_gpu(row["device"])]]
            rate = _read_rate(results, like if name else _choose_others(results, job, like), own=name is not None)
            found |= {} if rate is None else {key: rate}
    missing = [key for key in kinds if key not in found]
    for key in missing:
        # Spans may fit no document, and another process may hold the GPU's memory for a while.
        for part in list(kinds[key].values())[:TRY_ARMS]:
            found[key] = _try_kind(preparation, part, TRY_SECONDS / len(missing))
            if found[key].tokens_per_second is not None:
                break
    return {key: found[key] for key in kinds}


def _fits_device(job: Job, device: str) -> bool:
    wanted = job.resources.gpus_per_worker
    return wanted is None or _is_gpu(device) == (wanted > 0)


def _is_gpu(device: str) -> bool:
    return device != "cpu"


def _list_trials(results: Path, job: str | None) -> list[dict[str, Any]]:
    """A job's trials, or all jobs', the last one first; of each what makes it like another, and the `key`."""
    try:
        table = read_table(results, "trials", job, columns=["job", "trial_id", "device", "updated_at", *LIKE])
    except DamagedError:
        return []
    place = table.column_names.index("updated_at")
    # Arrow loads pandas to make Python's times of its own.
    rows: list[dict[str, Any]] = table.set_column(place, "updated_at", table["updated_at"].cast(pa.int64())).to_pylist()
    rows = [row | {"key": make_key(row, _is_gpu(row["device"]))} for row in rows if row["device"]]
    return sorted(rows, key=lambda row: row["updated_at"] or 0, reverse=True)


def _choose_others(results: Path, job: Job, like: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials of other jobs that ran with such resources as this job's will."""
    others = [row for row in like if row["job"] != job.name]
    ran = {(row["job"], _is_gpu(row["device"])) for row in others}
    alike = {(name, gpu) for name, gpu in ran if _shares_resources(results, name, job, gpu)}
    return [row for row in others if (row["job"], _is_gpu(row["device"])) in alike]


def _read_rate(results: Path, like: Sequence[dict[str, Any]], *, own: bool) -> Rate | None:
    """The median rate of the last trials on one kind of device; None where none has a curve."""
    like = [row for row in like if row["device"] == like[0]["device"]][:MOST_TRIALS]
    try:
        rates = _read_rates(results, like)
    except DamagedError:
        return None
    if not rates:
        return None
    whose = "this job" if own else f"job {', '.join(sorted({row['job'] for row in like}))}"
    count = f"{len(rates)} trial{'s' * (len(rates) > 1)}"
    return Rate(float(np.median(rates)), f"measured in {count} of {whose} on {like[0]['device']}")


def _shares_resources(results: Path, name: str, job: Job, gpu: bool) -> bool:
    """Whether another job's trials had the resources, on a GPU or not, that this one's will have."""
    with contextlib.suppress(JobError, OSError):
        theirs = load_job(results / name / "job.yaml").resources
        return _list_resources(theirs, gpu) == _list_resources(job.resources, gpu)
    return False


def _list_resources(resources: Resources, gpu: bool) -> Key:
    """What of them the rate of a step depends on, as they were resolved on a GPU or not."""
    share = float(gpu) if resources.gpus_per_worker is None else resources.gpus_per_worker
    compiles = resources.compile if gpu else "never"
    return resources.workers, resources.cpus_per_worker, share, compiles, resources.chunk_tokens


def _read_rates(results: Path, trials: Sequence[Mapping[str, Any]]) -> list[float]:
    """Tokens over the seconds in the training loop, of each trial that has a curve."""
    if not trials:
        return []
    jobs, ids = sorted({row["job"] for row in trials}), [row["trial_id"] for row in trials]
    rates: dict[str, float] = {}
    for name in jobs:
        rows = open_tables(results, "curves", name, ids).execute(
            """
            with parts as (
                select trial_id, value, tokens - lag(tokens, 1, 0) over (partition by trial_id order by step) as part
                from curves where metric = 'train_tokens_per_second'
            )
            select trial_id, sum(part) / sum(part / value) from parts group by trial_id
            """
        )
        rates |= dict(rows.fetchall())
    return list(rates.values())


def _measure_evaluation(results: Path, name: str) -> tuple[float | None, int]:
    """Median seconds of a trial of this job beside its pre-training, and the number of trials that tell."""
    if not (results / name).is_dir():
        return None, 0
    rows = open_tables(results, "trials stages", name).execute(
        """
        select t.wall_seconds - coalesce(sum(s.wall_seconds) filter (where s.kind = 'pretrain' and not s.reused), 0)
        from trials t left join stages s using (trial_id)
        where t.status = 'complete' and t.attempts = 1 and t.arm not like 'baseline:%'
        group by t.trial_id, t.wall_seconds
        """
    )
    seconds = [max(row[0], 0.0) for row in rows.fetchall()]
    return (float(np.median(seconds)) if seconds else None), len(seconds)


def _try_kind(preparation: Preparation, part: Work, seconds: float) -> Rate:
    """Tried out once on a machine, and kept as a stage: importing what trains takes longer than all else of a plan."""
    resources, gpu = part.job.resources, _wants_gpu(part.job)
    if gpu and not _has_gpu():
        return Rate(None, "no like trial has run, and there is no GPU here to try it out")
    threads = resources.cpus_per_worker
    versions = [metadata.version(name) for name in ("raylab", "torch", "transformers")]
    machine = [platform.node(), platform.machine(), os.cpu_count(), gpu]
    key = {"like": list(_make_key(part.job)), "threads": threads, "chunk_tokens": resources.chunk_tokens}
    key |= {"machine": machine, "versions": versions}

    def build(folder: Path) -> dict[str, Any]:
        from raylab.runs.tryout import try_out

        spec = make_spec(preparation, part.values, preparation.job.search.seeds[0], "fixed")
        rate = try_out(spec, seconds)
        if rate is None:
            raise InfeasibleError("not kept: another arm of the kind, or the same one later, may work")
        return {"tokens_per_second": rate}

    try:
        rate = build_stage(preparation.results, "rate", key, build).info["tokens_per_second"]
    except InfeasibleError:
        return Rate(None, "no like trial has run, and it could not be tried out here in a second")
    where = "GPU, uncompiled" if gpu else f"CPU, {threads} thread{'s' * (threads > 1)}"
    many = f", times {resources.workers} workers" if resources.workers > 1 else ""
    return Rate(rate * resources.workers, f"tried out on this machine's {where}{many}")


def _wants_gpu(job: Job) -> bool:
    wanted = job.resources.gpus_per_worker
    return _has_gpu() if wanted is None else wanted > 0


def _has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, without importing torch, which takes a second."""
    return Path("/proc/driver/nvidia/version").exists()
