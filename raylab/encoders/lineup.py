"""A job made from another one: encoders as they are, without pre-training, side by side on its corpus."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylab.base.identity import digest
from raylab.base.mistakes import JobError
from raylab.job.blocks import Pretrain
from raylab.job.designs import list_points
from raylab.job.jobs import check_job, resolve_encoder
from raylab.job.settings import SETTINGS, dump_job, is_list
from raylab.job.specs import Choices, Job
from raylab.runs.preparation import name_point, prepare
from raylab.runs.trials import TRIAL_ID, find_trial

LONGEST_NAME = 64


def line_up(job: Job, names: Sequence[str], results: Path) -> Job:
    """The job that evaluates encoders on a job's corpus, each a frozen arm; the first is the base arm.

    A name is a Hugging Face model's, a directory's, or the id of a complete trial. The seeds are those on which the
    job's own arms are ranked. Of its space only lists of `evaluate` stay, as lists: every freeze depth, number of
    shots or probe that it searches is scored for each encoder. Raises JobError.
    """
    starts = list(dict.fromkeys(_find_start(name, results) for name in names))
    raw, search = dump_job(job), job.search
    own = f"evaluate-{_shorten(starts[0][1])}" + (f"-and-{len(starts) - 1}-{digest(starts, 6)}" if starts[1:] else "")
    name = f"{job.name}.{own}"
    raw["name"] = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 7]}-{digest(name, 6)}"
    raw["encoder"] = {starts[0][0]: starts[0][1]}
    raw["analysis"] = {}  # what was asked of the job's own arms
    raw["pretrain"] = Pretrain(objective="none").model_dump(mode="json")
    for setting, entry in search.space.items():
        block, _, field = setting.partition(".")
        if block == "evaluate" and setting in SETTINGS and is_list(setting) and isinstance(entry, Choices):
            listed = [v for choice in entry.choices for v in (choice if isinstance(choice, list | tuple) else [choice])]
            raw["evaluate"][field] = list(dict.fromkeys(listed))
    space: dict[str, Any] = {}
    for kind, start in starts:
        space.setdefault(f"encoder.{kind}", []).append(start)
    raw["search"] = {
        "space": space,
        "design": "one_factor",  # the base arm, then each other encoder in its place
        "seeds": list(search.confirm.seeds if search.confirm else search.seeds),
        "targets": raw["search"]["targets"],
    }
    return check_job(raw)


def check_starts(job: Job, results: Path) -> None:
    """Raises JobError with every encoder of such a job that can't serve, before any of them is scored."""
    preparation, problems = prepare(job, results), []
    for values in list_points(job):
        try:
            name_point(preparation, values)
        except JobError as error:
            name = next(iter(values.values()), job.encoder.pretrained or job.encoder.trial)
            problems += [f"{problem} (of {name})" for problem in error.problems]
    if problems:
        raise JobError(problems)


def _find_start(name: str, results: Path) -> tuple[str, str]:
    """Which setting of `encoder` a name is for, and its value there."""
    if TRIAL_ID.fullmatch(name) and not Path(name).is_dir():
        return "trial", str(find_trial(results, name, "evaluate")["trial_id"])
    return "pretrained", resolve_encoder(name, Path.cwd())


def _shorten(name: str) -> str:
    """A part of a job's name: the last of a Hugging Face name; of a directory its parent's too, which tells more."""
    parts = Path(name).parts[-2:] if Path(name).is_absolute() else Path(name).parts[-1:]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.")
