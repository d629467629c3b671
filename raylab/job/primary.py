"""The comparison that a job names before its data are seen: `analysis.primary`, parsed and set against its arms."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from raylab.base.identity import canonical
from raylab.base.mistakes import JobError
from raylab.job.designs import AROUND_BASE, FIXED, Values, as_setting, list_points, list_values
from raylab.job.settings import list_settings
from raylab.job.specs import Choices, Job, Target

BASE = "base"
WINNER = "winner"
# As `baselines.BASELINES` names them, which needs scikit-learn; a test holds them equal.
BASELINES = ("majority", "tfidf")
SYNTAX = "write ARM vs ARM [at KEY=VALUE, ...], such as 'objective=declutr vs objective=mlm at shots=32'"
# What a cell may be named by -> field of Target.
CELL = {"task": "task", "metric": "metric", "class": "class_name", "shots": "shots", "frozen_layers": "frozen_layers",
        "probe": "probe"}  # fmt: skip


class Named(NamedTuple):
    """An arm as it was named: the searched values that make it; or `winner`, or a baseline."""

    text: str
    values: Values
    special: str | None = None


class Declared(NamedTuple):
    """Two arms, and the cell in which they are compared."""

    a: Named
    b: Named
    target: Target


def read_primary(job: Job, text: str) -> Declared:
    """The arms and the cell of 'ARM vs ARM [at KEY=VALUE, ...]'. Raises JobError with every mistake.

    An arm is searched settings with their values, by their last names: the others as in the base arm; `base`; of a
    search `winner`, the best arm of it; or `baseline:NAME`. What the cell leaves out is that of the search's first
    target, or the first of `evaluate`.
    """
    left, right, at = split_sides(text)
    problems: list[str] = []
    arms: list[Named] = []
    for side in (left, right):
        try:
            arms.append(read_arm(job, side))
        except JobError as error:
            problems += error.problems
    try:
        target = read_cell_target(job, split_pairs(at) if at else {})
    except JobError as error:
        problems += error.problems
    if problems:
        raise JobError(problems)
    if arms[0].values == arms[1].values and arms[0].special == arms[1].special:
        raise JobError([f"{left!r} and {right!r} are the same arm; name two"])
    return Declared(arms[0], arms[1], target)


def split_sides(text: str) -> tuple[str, str, str | None]:
    """The two arms and the cell of 'ARM vs ARM [at KEY=VALUE, ...]', as written. Raises JobError."""
    sides = re.split(r"\s+vs\s+", text.strip())
    if len(sides) != 2:
        raise JobError([f"{text!r} does not name two arms; {SYNTAX}"])
    right, *at = re.split(r"\s+at\s+", sides[1])
    if len(at) > 1:
        raise JobError([f"{text!r} says 'at' twice; {SYNTAX}"])
    return sides[0], right, at[0] if at else None


def split_pairs(text: str) -> dict[str, str]:
    """KEY=VALUE, ... as written. A comma within a value stays: the next key begins behind one."""
    pairs: dict[str, str] = {}
    for part in re.split(r",\s*(?=[\w.]+\s*=)", text.strip()):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key or not value:
            raise JobError([f"{part.strip()!r} is not KEY=VALUE; {SYNTAX}"])
        if key in pairs:
            raise JobError([f"'{key}' is named twice in {text!r}; keep one"])
        pairs[key] = value
    return pairs


def _near(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(valid)}"


def read_cell_target(job: Job, pairs: Mapping[str, Any]) -> Target:
    """The target that names a cell of `scores`; raises JobError for keys that are none. It checks no values."""
    if unknown := [key for key in pairs if key not in CELL]:
        raise JobError([f"'{key}' is no part of a cell; {_near(key, list(CELL))}" for key in unknown])
    first = job.search.targets[0] if job.search.targets else None
    evaluate = job.evaluate
    start: dict[str, Any] = {
        "task": (evaluate.tasks or tuple(job.corpus.tasks))[0], "frozen_layers": evaluate.frozen_layers[0]
    }  # fmt: skip
    if first is not None and first.table == "scores":
        start = {field: getattr(first, field) for field in (*CELL.values(), "mode")}
    fields = start | {CELL[key]: value for key, value in pairs.items()}
    if isinstance(fields.get("shots"), str) and fields["shots"].isdigit():
        fields["shots"] = int(fields["shots"])
    if (isinstance(fields.get("shots"), str) and fields["shots"] != "full") or fields.get("shots") == 0:
        raise JobError([f"shots={fields['shots']}: must be a number above 0, or full"])
    if "metric" in pairs:
        fields["mode"] = "min" if pairs["metric"] == "calibration_error" else "max"
        if "class" not in pairs and not str(pairs["metric"]).endswith("_class"):
            fields["class_name"] = None
    if "class_name" in fields:
        fields["class"] = fields.pop("class_name")
    return Target(**fields)


def read_arm(job: Job, text: str) -> Named:
    """An arm by its settings, as `read_primary` takes them. Raises JobError with every mistake."""
    text = text.strip()
    if text == WINNER:
        if job.search.design in FIXED:
            raise JobError(
                [f"'winner' is the best arm of a search, and design {job.search.design} is none; name settings"]
            )
        return Named(text, {}, WINNER)
    if text.startswith("baseline:"):
        if text.removeprefix("baseline:") not in BASELINES:
            raise JobError([f"'{text}' is no baseline; {_near(text, [f'baseline:{name}' for name in BASELINES])}"])
        return Named(text, {}, text)
    named: Values = {}
    problems: list[str] = []
    for key, value in ({} if text == BASE else split_pairs(text)).items():
        try:
            name = _find_setting(job, key)
            named[name] = _find_value(job, name, value)
        except JobError as error:
            problems += error.problems
    if problems:
        raise JobError(problems)
    return Named(text, _find_point(job, text, named) if job.search.design in FIXED else named)


def _find_setting(job: Job, key: str) -> str:
    """The searched setting of a name, or of its last parts."""
    space = list(job.search.space)
    found = [name for name in space if name == key] or [name for name in space if name.endswith(f".{key}")]
    if len(found) > 1:
        raise JobError([f"'{key}' may be {' or '.join(found)}; write one of them"])
    if found:
        return found[0]
    if not space:
        raise JobError([f"'{key}': the job searches nothing, so it has one arm; add search.space"])
    near = difflib.get_close_matches(key, [name.rsplit(".", 1)[-1] for name in space], n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"searched: {', '.join(space)}"
    raise JobError([f"'{key}' is not searched, so no arms differ in it; {hint}"])


def _write(value: Any) -> str:
    return canonical(value) if isinstance(value, list | dict) else str(value).replace(" ", "")


def _find_value(job: Job, name: str, text: str) -> Any:
    """The value of a searched setting that a text names: a listed one, the base arm's, or a number of a range."""
    entry, wanted = job.search.space[name], text.replace(" ", "").strip("'\"")
    own = list_settings(job)[name]
    if job.search.design in FIXED or isinstance(entry, Choices):
        listed = list_values(name, entry)
        # The base arm runs beside the arms of every design but a grid.
        if job.search.design != "grid" and all(as_setting(name, value) != own for value in listed):
            listed.append(own[0] if isinstance(own, list) and len(own) == 1 else own)
        for value in listed:
            if wanted in (_write(value), _write(value).lower()) or _same_number(value, wanted):
                return value
        raise JobError([f"{name.rsplit('.', 1)[-1]}={text}: no arm has it; {_near(text, [_write(v) for v in listed])}"])
    try:
        number = float(wanted)
    except ValueError:
        raise JobError([f"{name.rsplit('.', 1)[-1]}={text}: is not a number"]) from None
    if not entry.low <= number <= entry.high:
        raise JobError([f"{name.rsplit('.', 1)[-1]}={text}: no arm has it; from {entry.low:g} to {entry.high:g}"])
    return number


def _same_number(value: Any, text: str) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and float(text) == value
    except ValueError:
        return False


def _find_point(job: Job, text: str, named: Values) -> Values:
    """The point of a fixed design that has the named values, and else those of the base arm."""
    own = list_settings(job)
    base = {name: own[name] for name in job.search.space}

    def level(values: Values, name: str) -> Any:
        if name in values:
            return as_setting(name, values[name])
        return base[name] if job.search.design in AROUND_BASE else None

    points = [p for p in list_points(job) if all(level(p, n) == as_setting(n, v) for n, v in named.items())]
    # A setting that an arm does not read is no difference to the base arm.
    exact = [p for p in points if all(name in named or level(p, name) in (base[name], None) for name in base)]
    if len(exact) == 1 or (len(points) == 1 and named):
        return (exact or points)[0]
    if not points:
        raise JobError([f"'{text}': no arm of design {job.search.design} has all of that; see 'raylab plan'"])
    differing = [name for name in base if name not in named and len({_write(level(p, name)) for p in points}) > 1]
    told = ", ".join(name.rsplit(".", 1)[-1] for name in differing)
    raise JobError([f"'{text}': {len(points)} arms fit, none with all else as in the base arm; name {told} too"])
