"""The commands. Each imports what it needs when it runs, so that `status` and `query` stay quick."""

import getpass
import json
import os
import shlex
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Grid

from raylab.mistakes import Interrupted, JobError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Hyperparameter and ablation studies of text encoders for healthcare text, on Ray.",
)
# Tables keep their shape in a pipe or file, where rich would take 80 columns.
output = Console(width=None if sys.stdout.isatty() else 140)
messages = Console(stderr=True, soft_wrap=True)

ResultsOption = Annotated[Path, typer.Option("--results", help="where results are kept")]
DataOption = Annotated[Path | None, typer.Option("--data", help="a folder that holds the corpus files, by name")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="SETTING=VALUE, over the job file; repeatable")]
RESULTS = Path("results")


class Format(StrEnum):
    """How rows are printed."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"
    arrow = "arrow"


FormatOption = Annotated[Format, typer.Option("--format", help="table, json, csv, parquet or arrow")]


def _overrides(items: list[str] | None) -> dict[str, Any]:
    from raylab.jobs import read_value

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


def _load(path: Path, data: Path | None, overrides: list[str] | None) -> Any:
    from raylab.jobs import load_job

    return load_job(path, overrides=_overrides(overrides), data=data)


def _print_rows(rows: Any, form: Format) -> None:
    """Rows (an Arrow table, or mappings of one set of keys) on stdout, in the asked format."""
    import pyarrow as pa

    # Arrow's own conversion from Python loads pandas: only where an Arrow format is asked for.
    listed = rows if isinstance(rows, list) else rows.to_pylist()
    if form is Format.json:
        print(json.dumps(listed, default=str, indent=1))
        return
    if form is Format.table:
        names = list(listed[0]) if isinstance(rows, list) else rows.column_names
        grid = Grid()
        for name in names:
            grid.add_column(name, overflow="fold")
        for row in listed:
            grid.add_row(*("" if row.get(name) is None else _show(row[name]) for name in names))
        output.print(grid)
        return
    table = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
    if form is Format.csv:
        import pyarrow.csv

        pa.csv.write_csv(table, sys.stdout.buffer)
    elif form is Format.parquet:
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, sys.stdout.buffer)
    else:
        with pa.ipc.new_stream(sys.stdout.buffer, table.schema) as writer:
            writer.write_table(table)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="the job file")],
    results: ResultsOption = RESULTS,
    data: DataOption = None,
    overrides: SetOption = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; else Ray starts here")] = None,
    here: Annotated[bool, typer.Option("--here", help="every trial in this process, without Ray: to debug")] = False,
) -> None:
    """Run a job, or what is missing of it; ends with the arms ranked."""
    _run(_load(job, data, overrides), results, address, here)


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="the job's name")],
    results: ResultsOption = RESULTS,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; else Ray starts here")] = None,
    here: Annotated[bool, typer.Option("--here", help="every trial in this process, without Ray")] = False,
) -> None:
    """Go on with a job from the file kept beside its results."""
    from raylab.jobs import load_job
    from raylab.results import find_job

    _run(load_job(find_job(results, name)), results, address, here)


def _run(job: Any, results: Path, address: str | None, here: bool) -> None:
    from raylab.progress import SweepProgress
    from raylab.sweep import run_job

    progress = SweepProgress(messages)
    given = [*(("--results", str(results)) if results != RESULTS else ()), *(("--address", address) if address else ())]
    again = shlex.join(["raylab", "resume", job.name, *given])
    try:
        states = run_job(job, results.resolve(), progress, address=address, here=here)
    except (KeyboardInterrupt, Interrupted):
        progress.stop()
        messages.print(f"interrupted; what is done is kept. Go on with: {again}", highlight=False)
        raise typer.Exit(1) from None
    finally:
        progress.stop()
    _print_ranking(job, results.resolve())
    if states.get("failed"):
        messages.print(
            f"{states['failed']} trial(s) failed; see: raylab status {job.name}. Try them again with: {again}"
        )
        raise typer.Exit(1)
    if states and not states.keys() & {"complete", "stopped"}:
        messages.print("no trial could work; see the errors: raylab query 'select trial_id, error from trials'")
        raise typer.Exit(1)


def _interval(value: Any, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{value.mean:{sign}.3f}"
    return text if value.num_seeds < 2 else f"{text} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def _print_ranking(job: Any, results: Path, split: str = "validation") -> None:
    """Arms by cell on stdout: value, difference to the base arm, held-out measures."""
    from raylab.preparation import name_point, prepare
    from raylab.ranking import label_arms, list_cells, rank_arms, summarise_heldout
    from raylab.search import is_current
    from raylab.tables import list_trials

    preparation = prepare(job, results)
    base, _ = name_point(preparation, {})
    rows = {row["arm"]: row for row in list_trials(results, job.name)}
    arms = {arm for arm, row in rows.items() if is_current(job, row, lambda v: name_point(preparation, v)[0])} | {base}
    for table, cell, mode in list_cells(job):
        ranked = rank_arms(results, job, table, cell, mode, base, split, arms)
        if not ranked:
            continue
        named = ", ".join(f"{k}={v}" for k, v in cell.items() if v is not None)
        seeds = max(row.value.num_seeds for row in ranked)
        grid = Grid(title=f"{job.name}, {split}: {named}; mean over draws and {seeds} seed(s), 95 % t interval")
        for column in ("arm", "settings", "value", "difference to base"):
            grid.add_column(column, overflow="fold")
        for row in ranked:
            grid.add_row(
                row.arm, row.label, _interval(row.value), _interval(row.difference, True) if row.difference else ""
            )
        output.print(grid)
    heldout = {arm: found for arm, found in summarise_heldout(results, job).items() if arm in arms}
    if heldout and split == "validation":
        titles = {"mlm_loss": "MLM loss", "unigram_entropy": "unigram entropy", "retrieval_error": "retrieval error",
                  "retrieval_error_change": "change of it", "category_accuracy": "category accuracy"}  # fmt: skip
        titles = {name: title for name, title in titles.items() if any(name in found for found in heldout.values())}
        grid = Grid(title="held-out measures at the end of pre-training, validation documents, mean over all seeds")
        labels = label_arms(results, job)
        for title in ("arm", "settings", *titles.values()):
            grid.add_column(title, overflow="fold")
        for arm, measures in heldout.items():
            cells = (_interval(measures[name], name.endswith("change")) if name in measures else "" for name in titles)
            grid.add_row(arm, labels.get(arm, ""), *cells)
        output.print(grid)
    output.print(f'tables: {results / job.name}; ask them with: raylab query "select * from trials"', highlight=False)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="one job; else all")] = None,
    results: ResultsOption = RESULTS,
    form: FormatOption = Format.table,
) -> None:
    """Trials by state, from the tables."""

    from raylab.results import summarise_jobs

    rows = summarise_jobs(results, name)
    if not rows and form is Format.table:
        messages.print(f"no jobs under {results}")
        return
    _print_rows(rows, form)


@app.command()
def query(
    sql: Annotated[str | None, typer.Argument(help="DuckDB SQL over the tables")] = None,
    listing: Annotated[bool, typer.Option("--list", help="the tables and their columns")] = False,
    results: ResultsOption = RESULTS,
    form: FormatOption = Format.table,
) -> None:
    """SQL over the result tables, while they are being written too."""

    from raylab.results import query as ask
    from raylab.tables import SCHEMAS

    if listing:
        columns = [{"table": t, "column": f.name, "type": str(f.type)} for t, schema in SCHEMAS.items() for f in schema]
        _print_rows(columns, form)
    elif sql is None:
        raise JobError(["query: give SQL in quotes, or --list"])
    else:
        _print_rows(ask(results, sql), form)


@app.command()
def plan(
    job: Annotated[Path, typer.Argument(help="the job file")],
    results: ResultsOption = RESULTS,
    data: DataOption = None,
    overrides: SetOption = None,
    form: FormatOption = Format.table,
) -> None:
    """What a job would run and what the corpus makes of its settings, before any GPU."""
    from raylab.plan import plan_job, print_plan

    found = plan_job(_load(job, data, overrides), results.resolve())
    if form is Format.json:
        print(json.dumps(found, indent=1))
    else:
        print_plan(found, output)


@app.command()
def unseal(
    name: Annotated[str, typer.Argument(help="the job's name")],
    arms: Annotated[list[str] | None, typer.Argument(help="arms; else all that are ranked")] = None,
    results: ResultsOption = RESULTS,
    reason: Annotated[str, typer.Option(help="why, for the record")] = "",
) -> None:
    """Score the test split from the kept encoders; each access is recorded."""
    from raylab.jobs import load_job
    from raylab.results import find_job
    from raylab.unseal import unseal_job

    job = load_job(find_job(results, name))
    unseal_job(job, results.resolve(), arms or [], by=_user(), reason=reason, tell=messages.print)
    _print_ranking(job, results.resolve(), split="test")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@app.command()
def schema() -> None:
    """The JSON Schema of job files, for editors."""
    from raylab.specs import Job

    print(json.dumps(Job.model_json_schema(), indent=1))


@app.command()
def synth(
    directory: Annotated[Path, typer.Argument(help="where the notes are written")],
    notes: Annotated[int, typer.Option(help="how many")] = 2000,
    seed: Annotated[int, typer.Option(help="the same seed gives the same notes")] = 0,
    label_noise: Annotated[float, typer.Option(help="share of labels replaced by another")] = 0.05,
    max_words: Annotated[int, typer.Option(help="the longest note")] = 3000,
) -> None:
    """Write synthetic notes of known structure, as Parquet."""
    from raylab.synth import write_notes

    try:
        summary = write_notes(directory, num_notes=notes, seed=seed, label_noise=label_noise, max_words=max_words)
    except ValueError as error:
        raise JobError([f"synth: {problem}" for problem in str(error).split("; ")]) from None
    except OSError as error:
        raise JobError([f"{directory}: {error.strerror}; choose a folder that can be written"]) from None
    messages.print(f"{directory / 'notes.parquet'}: {summary['notes']} notes of {summary['patients']} patients")


# What typer raises for a wrong command line: of click, or of the copy of click that typer carries.
UsageError: type[Any] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> None:
    """The `raylab` command: exit code 0 done, 1 it ran and something failed, 2 the request is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    sys.exit(_call(lambda: app(args=given, standalone_mode=False), debug))


def _call(act: Callable[[], Any], debug: bool) -> int:
    try:
        return int(act() or 0)
    except JobError as error:
        if debug:
            raise
        for problem in error.problems:
            print(f"raylab: {problem}", file=sys.stderr)
        return 2
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
        else:
            print(f"raylab: {error.format_message().rstrip('.')}; see 'raylab --help'", file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print("raylab: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        # The message of an unforeseen error could quote a text: its kind and place must do.
        from raylab.mistakes import describe_error

        print(f"raylab: {describe_error(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
