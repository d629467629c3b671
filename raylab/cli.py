"""The `raylab` command, and the commands about jobs; `encoders` has those about encoders, `questions` the statistics.

Each imports what it needs when it runs, so that `status` and `query` stay quick.
"""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from raylab.base.mistakes import JobError
from raylab.commands.encoders import evaluate, export, profile, unseal
from raylab.commands.launch import is_dashboard, launch
from raylab.commands.options import (
    RESULTS,
    AddressOption,
    DataOption,
    FormatOption,
    ResultsOption,
    SetOption,
    load,
    open_folder,
    read_overrides,
)
from raylab.commands.output import Format, messages, output, print_diagnosis, print_rows, tell_submitted
from raylab.commands.questions import compare, correlate, effects, report, write_optuna, write_tensorboard

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Hyperparameter and ablation studies of text encoders for healthcare text, on Ray.",
)


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
    launch(load(job, data, overrides), results, address, here)


@app.command()
def resume(
    name: Annotated[str, typer.Argument(help="the job's name")],
    results: ResultsOption = RESULTS,
    data: DataOption = None,
    overrides: SetOption = None,
    address: Annotated[
        str | None, typer.Option(help="a running Ray cluster, or the URL of its dashboard; else Ray starts here")
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="every trial in this process, without Ray")] = False,
) -> None:
    """Go on with a job from the file kept beside its results."""
    if address is not None and is_dashboard(address):
        from raylab.runs.submission import check_folder, connect, resume_job

        if here:
            raise JobError(["--here: runs in this process, not on a cluster; leave out --here or --address"])
        read_overrides(overrides)
        changes = [part for item in overrides or [] for part in ("--set", item)]
        changes += ["--data", check_folder("--data", str(data))] if data is not None else []
        with connect(address) as cluster:
            tell_submitted(name, address, resume_job(cluster, name, _there(results), changes))
        return
    from raylab.results.queries import find_job

    launch(load(find_job(open_folder(results), name), data, overrides), results, address, here)


def _there(results: str) -> str | None:
    """The results folder on a cluster, where one was given."""
    from raylab.runs.submission import check_folder

    return None if results == RESULTS else check_folder("--results", results)


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="the job file")],
    address: Annotated[str, typer.Option(help="the cluster's dashboard, such as http://HOST:8265")],
    results: Annotated[str, typer.Option("--results", help="where results are kept, as the cluster's nodes see it")],
    data: Annotated[Path | None, typer.Option("--data", help="a folder of the cluster with the corpus files")] = None,
    overrides: SetOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="follow the log; end as the job does")] = False,
) -> None:
    """Run a job on a cluster, as a Ray Job of its own, and return; prints Ray's id of it."""
    from raylab.runs.submission import check_folder, connect, submit_job, wait_for

    folder = check_folder("--results", results)
    if data is not None:
        check_folder("--data", str(data))
    loaded = load(job, data, overrides)
    with connect(address) as cluster:
        submission_id = submit_job(cluster, loaded, folder)
        tell_submitted(loaded.name, address, submission_id)
        try:
            state = wait_for(cluster, submission_id) if wait else None
        except KeyboardInterrupt:
            again = shlex.join(["raylab", "stop", loaded.name, "--address", address])
            messages.print(f"no longer followed; the job goes on there. Stop it with: {again}", highlight=False)
            raise typer.Exit(1) from None
    if state not in (None, "succeeded"):
        messages.print(f"job {loaded.name} {state}", highlight=False)
        raise typer.Exit(1)


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="the job's name")],
    results: ResultsOption = RESULTS,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="go on printing while it grows")] = False,
) -> None:
    """What a job's run has printed."""
    if address is not None:
        from raylab.runs.submission import connect, print_logs

        with connect(address) as cluster:
            print_logs(cluster, name, follow)
        return
    from raylab.commands.output import print_log
    from raylab.results.queries import find_job
    from raylab.store.logs import open_log
    from raylab.store.storage import is_url

    folder = open_folder(results)
    find_job(folder, name)
    every = 2.0 if is_url(results) else 0.2
    print_log(lambda: open_log(folder, name), every if follow else None)


@app.command()
def stop(
    name: Annotated[str, typer.Argument(help="the job's name")],
    results: ResultsOption = RESULTS,
    address: AddressOption = None,
    now: Annotated[bool, typer.Option("--now", help="at once; what ran since the last rung is done again")] = False,
) -> None:
    """Have a running job stop: trials end after their rung, or at once."""
    if address is not None:
        from raylab.runs.submission import connect, stop_job

        with connect(address) as cluster:
            messages.print(stop_job(cluster, name, _there(results), now), highlight=False)
        return
    from raylab.results.queries import find_job
    from raylab.store.driver import request_stop

    folder = open_folder(results)
    find_job(folder, name)
    request_stop(folder, name, now)
    messages.print(f"{name}: asked to stop {'at once' if now else 'after the rungs that run'}", highlight=False)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="one job; else all")] = None,
    results: ResultsOption = RESULTS,
    address: AddressOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Trials by state, from the tables."""
    if address is not None:
        from raylab.runs.submission import connect, summarise_cluster

        with connect(address) as cluster:
            rows = summarise_cluster(cluster, name, _there(results))
    else:
        from raylab.results.queries import summarise_jobs

        rows = summarise_jobs(open_folder(results), name)
    if not rows and form is Format.table:
        messages.print(f"no jobs {f'submitted to {address}' if address else f'under {results}'}")
        return
    print_rows(rows, form)


@app.command()
def query(
    sql: Annotated[str | None, typer.Argument(help="DuckDB SQL over the tables")] = None,
    listing: Annotated[bool, typer.Option("--list", help="the tables, ready views and their columns")] = False,
    results: ResultsOption = RESULTS,
    form: FormatOption = Format.table,
) -> None:
    """SQL over the result tables, while they are being written too."""
    from raylab.results.queries import query as ask

    if listing:
        from raylab.results.views import describe_tables

        print_rows(describe_tables(), form)
    elif sql is None:
        raise JobError(["query: give SQL in quotes, or --list"])
    else:
        print_rows(ask(open_folder(results), sql), form)


@app.command()
def compact(
    name: Annotated[str | None, typer.Argument(help="one job; else all")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Pack the small files of a job's tables into few; safe while it runs and is queried."""
    from raylab.results.compaction import compact_results

    for job, packed in compact_results(open_folder(results), name):
        counts = ", ".join(f"{count:,} of {table}" for table, count in packed.items())
        messages.print(f"{job}: {f'packed {counts}' if counts else 'nothing to pack'}", highlight=False)


@app.command()
def plan(
    job: Annotated[Path, typer.Argument(help="the job file")],
    results: ResultsOption = RESULTS,
    data: DataOption = None,
    overrides: SetOption = None,
    form: FormatOption = Format.table,
) -> None:
    """What a job would run and what the corpus makes of its settings, before any GPU."""
    from raylab.runs.plan import plan_job, print_plan

    found = plan_job(load(job, data, overrides), open_folder(results).resolve())
    if form is Format.json:
        print(json.dumps(found, indent=1))
    else:
        print_plan(found, output)


app.command()(unseal)
app.command()(export)
app.command()(profile)
app.command()(evaluate)
app.command()(compare)
app.command()(effects)
app.command()(correlate)
app.command("optuna")(write_optuna)
app.command("tensorboard")(write_tensorboard)
app.command()(report)


@app.command()
def diagnose(name: str, results: ResultsOption = RESULTS, form: FormatOption = Format.table) -> None:
    """What is wrong with each arm's embeddings, by stated rules, with the numbers they rest on."""
    from raylab.statistics.diagnosis import diagnose_job

    print_diagnosis(diagnose_job(open_folder(results), name), form)


@app.command()
def schema() -> None:
    """The JSON Schema of job files, for editors."""
    from raylab.job.specs import Job

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
    from raylab.data.synth import write_notes

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
    code = _call(lambda: app(args=given, standalone_mode=False), debug)
    if arguments is not None:
        sys.exit(code)
    # Else the interpreter takes torch apart, object by object, before it ends: seconds.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


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
        from raylab.base.mistakes import describe_error, find_storage_problem

        if trouble := find_storage_problem(error):
            print(f"raylab: the results can't be read or written ({trouble}); mend that and try again", file=sys.stderr)
            return 1
        # The message of an unforeseen error could quote a text: its kind and place must do.
        print(f"raylab: {describe_error(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
