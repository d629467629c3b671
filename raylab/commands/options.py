"""The options that commands share, and what is made of their values."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylab.base.mistakes import JobError
from raylab.commands.output import Format

# A job is loaded only by the commands that take one.
if TYPE_CHECKING:
    from raylab.job.specs import Job

ResultsOption = Annotated[str, typer.Option("--results", help="where results are kept: a folder, or a URL (s3://...)")]
DataOption = Annotated[Path | None, typer.Option("--data", help="a folder that holds the corpus files, by name")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="SETTING=VALUE, over the job file; repeatable")]
AddressOption = Annotated[str | None, typer.Option(help="a cluster's dashboard, such as http://HOST:8265")]
RESULTS = "results"
FormatOption = Annotated[Format, typer.Option("--format", help="table, json, csv, parquet or arrow")]


def read_overrides(items: list[str] | None) -> dict[str, Any]:
    """Dotted setting -> value, of `--set SETTING=VALUE`. Raises JobError with every mistake."""
    from raylab.job.jobs import read_value

    found: dict[str, Any] = {}
    problems: list[str] = []
    for item in items or []:
        name, sign, value = item.partition("=")
        if not sign or not all(name.split(".")):
            problems.append(f"--set {item}: must be SETTING=VALUE, such as pretrain.num_tokens=1000000")
            continue
        try:
            found[name] = read_value(value)
        except JobError as error:
            problems += [f"--set {item}: {problem}" for problem in error.problems]
    if problems:
        raise JobError(problems)
    return found


def open_folder(where: str) -> Path:
    """The results folder, or this machine's mirror of a URL, up to date."""
    from raylab.store.storage import open_results, pull

    results = open_results(where)
    pull(results)
    return results


def load(path: Path, data: Path | None, overrides: list[str] | None) -> "Job":
    """The checked job of a file, with what the options change. Raises JobError."""
    from raylab.job.jobs import load_job

    return load_job(path, overrides=read_overrides(overrides), data=data)
