"""What a report is made of: sections of sentences, tables and figures; and what of a job every section reads."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raylab.job.settings import is_list, label_values
from raylab.job.specs import Job, Target
from raylab.results.ranking import BASELINE
from raylab.statistics.analysis import Arms

if TYPE_CHECKING:
    import duckdb
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


class Study(NamedTuple):
    """A job whose results are told: its tables, the cell in which its arms are compared, and those arms."""

    results: Path
    job: Job
    target: Target
    cell: dict[str, Any]
    arms: Arms


class Table(NamedTuple):
    """Rows of one set of keys: `shown` of them stand in the page, all in `tables/NAME.csv`.

    `name`: lower case with hyphens, once in a report. `columns`: key -> heading of those that the page shows; else all.
    """

    name: str
    title: str
    rows: Sequence[Row]
    columns: Mapping[str, str] | None = None
    shown: int = 20


class Plot(NamedTuple):
    """A drawn figure, kept as `figures/NAME.svg` and `.png`, with the rows that it shows as `tables/NAME.csv`.

    `alt` tells in words what is to be seen, numbers included, for who does not see it. `raster`: too many marks for
    an SVG in the page, which then holds the PNG.
    """

    name: str
    title: str
    alt: str
    figure: "Figure"
    rows: Sequence[Row]
    raster: bool = False


class Code(NamedTuple):
    """What is typed or written as it stands: a command, a job file."""

    text: str


Part = Table | Plot | Code | str


class Section(NamedTuple):
    """A subject: what is to be read first, then tables and figures. `name` is its anchor in the page."""

    name: str
    title: str
    lead: Sequence[str]
    parts: Sequence[Part] = ()


class MissingError(Exception):
    """A section has nothing to show; the reason is told at the end of the page."""


def ask(connection: "duckdb.DuckDBPyConnection", sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """The rows of a query, by the names of their columns."""
    found = connection.execute(sql, list(values))
    names = [name for name, *_ in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def name_arm(study: Study, arm: str) -> str:
    """An arm for people: what sets it apart, its hash where nothing does; or the name of a baseline."""
    if arm.startswith(BASELINE):
        return f"{arm.removeprefix(BASELINE)} (baseline)"
    return study.arms.labels.get(arm) or arm


def tell_cell(cell: dict[str, Any]) -> str:
    """A cell for people: its keys that have a value; where it has shots, none is all training rows."""
    told = cell | ({"shots": "full"} if "shots" in cell and cell["shots"] is None else {})
    return ", ".join(f"{key}={value}" for key, value in told.items() if value is not None)


def name_target(target: Target) -> str:
    """What a target measures, for people; which side is better where it is the lower one."""
    return f"{target.metric} of {target.task}" + (", lower is better" if target.mode == "min" else "")


def name_settings(names: Iterable[str]) -> dict[str, str]:
    """Settings for people: their last names; with the block before where two have the same."""
    names = list(names)
    last = [name.rsplit(".", 1)[-1] for name in names]
    return {
        name: short if last.count(short) == 1 else ".".join(name.split(".")[-2:])
        for name, short in zip(names, last, strict=True)
    }


def tell_level(setting: str, value: Any) -> str:
    """A setting's value, as tables hold it, for people."""
    if isinstance(value, str) and is_list(setting):
        return ", ".join(map(str, json.loads(value)))
    return "none" if value is None else label_values({setting: value}).partition("=")[2]
