"""The points of a search space: which settings have a meaning beside others, and which arms a fixed design runs."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from raylab.job.settings import is_integer, is_list, is_read, list_settings
from raylab.job.specs import Choices, Job, Range

# Searched setting -> value. Of the designs around the base arm, only what differs from it.
Values = dict[str, Any]
AROUND_BASE = ("one_factor", "leave_one_out", "factorial")
# What decides whether other settings are read.
DECIDERS = ("pretrain.objective", "pretrain.metadata.loss", "evaluate.frozen_layers")


def is_active(job: Job, name: str, values: Mapping[str, Any]) -> bool:
    """Whether a searched setting has a meaning beside the values chosen before it: its `when`, and what is read."""
    objective = values.get("pretrain.objective", job.pretrain.objective)
    loss = values.get("pretrain.metadata.loss", job.pretrain.metadata.loss)
    metadata = job.pretrain.metadata.model_copy(update={"loss": loss})
    pretrain = job.pretrain.model_copy(update={"objective": objective, "metadata": metadata})
    depths = values.get("evaluate.frozen_layers", job.evaluate.frozen_layers)
    evaluate = job.evaluate.model_copy(
        update={"frozen_layers": (depths,) if isinstance(depths, str) else tuple(depths)}
    )
    chosen = job.model_copy(update={"pretrain": pretrain, "evaluate": evaluate})
    if when := job.search.space[name].when:
        settings = list_settings(chosen) | dict(values)
        for condition, wanted in when.items():
            if settings[condition] not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
    return is_read(chosen, name)


def order_space(job: Job) -> list[str]:
    """The searched settings in the file's order, but each behind those that decide whether it has a meaning."""
    ordered: list[str] = []

    def add(name: str, above: tuple[str, ...]) -> None:
        if name not in job.search.space or name in ordered or name in above:
            return
        deciders = list(job.search.space[name].when or {})
        if name.startswith("pretrain.") and name != "pretrain.objective":
            deciders.append("pretrain.objective")
        if name == "pretrain.metadata.temperature":
            deciders.append("pretrain.metadata.loss")
        if name.startswith("evaluate.fine_tune."):
            deciders.append("evaluate.frozen_layers")
        for decider in deciders:
            add(decider, (*above, name))
        ordered.append(name)

    for name in job.search.space:
        add(name, ())
    return ordered


def step_value(name: str, entry: Range, index: int) -> int | float:
    """The value `index` steps above the low end, in decimal: 0.1 and two steps of 0.1 are 0.3, as if it were listed."""
    value = Decimal(str(entry.low)) + index * Decimal(str(entry.step or 1))
    return int(value) if is_integer(name) else float(value)


def last_step(entry: Range) -> int:
    """Steps from the low end to the highest value that is in the range."""
    low, high, step = (Decimal(str(number)) for number in (entry.low, entry.high, entry.step or 1))
    return int((high - low) // step)


def list_values(name: str, entry: Choices | Range) -> list[Any]:
    """The values of a setting on a grid."""
    if isinstance(entry, Choices):
        return list(entry.choices)
    return [step_value(name, entry, index) for index in range(last_step(entry) + 1)]


def as_setting(name: str, value: Any) -> Any:
    """A listed value as the setting holds it: a single one is a list of one where the setting is a list."""
    return [value] if is_list(name) and not isinstance(value, list) else value


def list_changes(job: Job, name: str) -> list[Any]:
    """The listed values of a setting that are not the base arm's own."""
    base = list_settings(job)[name]
    return [value for value in list_values(name, job.search.space[name]) if as_setting(name, value) != base]


def list_levels(job: Job, name: str) -> list[Any]:
    """The values that a setting of the space takes: around the base arm, the base's own among them, in front if new."""
    listed = list_values(name, job.search.space[name])
    if job.search.design not in AROUND_BASE or len(list_changes(job, name)) < len(listed):
        return listed
    return [list_settings(job)[name], *listed]


def _list_grid(job: Job) -> Iterator[Values]:
    """Every point, conditional settings only where they have a meaning; the last setting varies fastest."""

    def extend(values: Values, names: list[str]) -> Iterator[Values]:
        if not names:
            yield values
        elif not is_active(job, names[0], values):
            yield from extend(values, names[1:])
        else:
            for value in list_values(names[0], job.search.space[names[0]]):
                yield from extend({**values, names[0]: value}, names[1:])

    yield from extend({}, order_space(job))


def _list_one_factor(job: Job) -> Iterator[Values]:
    """The base arm, then each other value of each setting, all else as in the base."""
    yield {}
    for name in job.search.space:
        yield from ({name: value} for value in list_changes(job, name))


def _list_factorial(job: Job) -> Iterator[Values]:
    """Every level of every setting with every level of the others; the last setting varies fastest."""
    base, names = list_settings(job), list(job.search.space)
    for point in itertools.product(*(list_levels(job, name) for name in names)):
        pairs = zip(names, point, strict=True)
        yield {name: value for name, value in pairs if as_setting(name, value) != base[name]}


# The designs that don't depend on results. leave_one_out is one_factor with one value a setting: see `check_design`.
FIXED: dict[str, Callable[[Job], Iterator[Values]]] = {
    "grid": _list_grid,
    "one_factor": _list_one_factor,
    "leave_one_out": _list_one_factor,
    "factorial": _list_factorial,
}


def list_points(job: Job) -> Iterator[Values]:
    """The points of the job's fixed design, in the order in which they run."""
    return FIXED[job.search.design](job)


def count_trials(job: Job, num_arms: int) -> int:
    """The trials that so many arms make, those of the confirmation with the base arm among them."""
    confirm = job.search.confirm
    extra = (min(confirm.top, num_arms) + 1) * len(confirm.seeds) if confirm else 0
    return num_arms * len(job.search.seeds) + extra


def check_design(job: Job) -> list[str]:
    """What a design around the base arm asks of the space, one line for each rule that is broken."""
    design, problems = job.search.design, []
    if design not in AROUND_BASE:
        return []
    for name, entry in job.search.space.items():
        where = f"search.space.{name}"
        if design == "factorial":
            if entry.when:
                problems.append(
                    f"{where}: a factorial crosses every setting with all others; remove its 'when', or use grid"
                )
            elif unread := _find_unread(job, name):
                problems.append(
                    f"{where}: is not read where {unread}, so a factorial's effects can't be told apart; remove one of "
                    "the two, or use grid"
                )
            continue
        if not is_active(job, name, {}):
            problems.append(
                f"{where}: the base arm does not read it, and {design} changes one setting of the base arm at a time; "
                "change the base so that it does, remove the setting, or use grid"
            )
        elif design == "leave_one_out":
            if not isinstance(entry, Choices) or len(entry.choices) != 1:
                problems.append(f"{where}: leave_one_out takes one value, that without the component; list only that")
            elif not list_changes(job, name):
                problems.append(
                    f"{where}: {entry.choices[0]!r} is the base arm's own value, so nothing is left out; name another"
                )
    return problems


def _find_unread(job: Job, name: str) -> str | None:
    """A combination of levels in which a setting is not read, in words; None where there is none."""
    deciders = [decider for decider in DECIDERS if decider in job.search.space and decider != name]
    for levels in itertools.product(*(list_levels(job, decider) for decider in deciders)):
        values = dict(zip(deciders, levels, strict=True))
        if not is_active(job, name, values):
            # Those that alone are enough to hide it, else all of them.
            alone = [decider for decider in deciders if not is_active(job, name, {decider: values[decider]})]
            named = " and ".join(f"{decider} is {values[decider]!r}" for decider in alone or deciders)
            return named or "all else is as in the base arm"
    return None
