"""The commands. Each imports what it needs when it runs, so that `status` and `query` stay quick."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from raylab.mistakes import JobError
from raylab.output import Format, messages, name_user, output, print_ranking, print_rows, tell_submitted

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Hyperparameter and ablation studies of text encoders for healthcare text, on Ray.",
)
ResultsOption = Annotated[str, typer.Option("--results", help="where results are kept: a folder, or a URL (s3://...)")]
DataOption = Annotated[Path | None, typer.Option("--data", help="a folder that holds the corpus files, by name")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="SETTING=VALUE, over the job file; repeatable")]
AddressOption = Annotated[str | None, typer.Option(help="a cluster's dashboard, such as http://HOST:8265")]
RESULTS = "results"
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


def _open(where: str) -> Path:
    """The results folder, or this machine's mirror of a URL, up to date."""
    from raylab.storage import open_results, pull

    results = open_results(where)
    pull(results)
    return results


def _load(path: Path, data: Path | None, overrides: list[str] | None) -> Any:
    from raylab.jobs import load_job

    return load_job(path, overrides=_overrides(overrides), data=data)


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
    if _is_url(address):
        raise JobError(
            [f"--address {address}: a dashboard takes jobs by 'raylab submit'; 'run' joins a Ray (auto, IP:PORT)"]
        )
    _run(_load(job, data, overrides), results, address, here)


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
    if address is not None and _is_url(address):
        from raylab.submission import check_folder, connect, resume_job

        if here:
            raise JobError(["--here: runs in this process, not on a cluster; leave out --here or --address"])
        _overrides(overrides)
        changes = [part for item in overrides or [] for part in ("--set", item)]
        changes += ["--data", check_folder("--data", str(data))] if data is not None else []
        with connect(address) as cluster:
            tell_submitted(name, address, resume_job(cluster, name, _there(results), changes))
        return
    from raylab.results import find_job

    _run(_load(find_job(_open(results), name), data, overrides), results, address, here)


def _is_url(address: str | None) -> bool:
    return address is not None and address.startswith(("http://", "https://"))


def _there(results: str) -> str | None:
    """The results folder on a cluster, where one was given."""
    from raylab.submission import check_folder

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
    from raylab.submission import check_folder, connect, submit_job, wait_for

    folder = check_folder("--results", results)
    if data is not None:
        check_folder("--data", str(data))
    loaded = _load(job, data, overrides)
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
        from raylab.submission import connect, print_logs

        with connect(address) as cluster:
            print_logs(cluster, name, follow)
        return
    from raylab.output import print_log
    from raylab.results import find_job
    from raylab.storage import is_url, open_log

    find_job(folder := _open(results), name)
    every = 2.0 if is_url(results) else 0.2
    print_log(lambda: open_log(folder, name), every if follow else None)


def _run(job: Any, where: str, address: str | None, here: bool) -> None:
    from raylab.progress import SweepProgress
    from raylab.storage import LOG, push
    from raylab.sweep import run_job

    results = _open(where).resolve()
    # A live block would get in a debugger's way.
    progress = SweepProgress(messages, job.name, live=False if here else None)
    given = [*(("--results", where) if where != RESULTS else ()), *(("--address", address) if address else ())]
    again = shlex.join(["raylab", "resume", job.name, *given])

    def tell_end(why: str) -> None:
        progress.stop()
        messages.print(f"{why}; what is done is kept. Go on with: {again}", highlight=False)

    try:
        ended = run_job(job, results, progress, address=address, here=here, tell_lost=tell_end)
    except KeyboardInterrupt:
        tell_end("interrupted")
        raise typer.Exit(1) from None
    finally:
        progress.stop()
    push(results, results / job.name / LOG)  # what the end of the progress added
    print_ranking(job, results)
    failed = ended.states.get("failed", 0)
    if failed:
        messages.print(
            f"{failed} trial(s) failed; see: raylab status {job.name}. Try them again with: {again}", highlight=False
        )
    if ended.why is not None:
        messages.print(f"ended early: {ended.why}. What is done is kept; go on with: {again}", highlight=False)
    if failed or (ended.why is not None and not ended.by_limit):
        raise typer.Exit(1)
    if ended.states and not ended.states.keys() & {"complete", "stopped"}:
        messages.print("no trial could work; see the errors: raylab query 'select trial_id, error from trials'")
        raise typer.Exit(1)


@app.command()
def stop(
    name: Annotated[str, typer.Argument(help="the job's name")],
    results: ResultsOption = RESULTS,
    address: AddressOption = None,
    now: Annotated[bool, typer.Option("--now", help="at once; what ran since the last rung is done again")] = False,
) -> None:
    """Have a running job stop: trials end after their rung, or at once."""
    if address is not None:
        from raylab.submission import connect, stop_job

        with connect(address) as cluster:
            messages.print(stop_job(cluster, name, _there(results), now), highlight=False)
        return
    from raylab.driver import request_stop
    from raylab.results import find_job

    find_job(folder := _open(results), name)
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
        from raylab.submission import connect, summarise_cluster

        with connect(address) as cluster:
            rows = summarise_cluster(cluster, name, _there(results))
    else:
        from raylab.results import summarise_jobs

        rows = summarise_jobs(_open(results), name)
    if not rows and form is Format.table:
        messages.print(f"no jobs {f'submitted to {address}' if address else f'under {results}'}")
        return
    print_rows(rows, form)


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
        print_rows(columns, form)
    elif sql is None:
        raise JobError(["query: give SQL in quotes, or --list"])
    else:
        print_rows(ask(_open(results), sql), form)


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

    found = plan_job(_load(job, data, overrides), _open(results).resolve())
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

    folder = _open(results).resolve()
    job = load_job(find_job(folder, name))
    unseal_job(job, folder, arms or [], by=name_user(), reason=reason, tell=messages.print)
    print_ranking(job, folder, split="test")


@app.command()
def diagnose(name: str, results: ResultsOption = RESULTS, form: FormatOption = Format.table) -> None:
    """What is wrong with each arm's embeddings, by stated rules, with the numbers they rest on."""
    from raylab.diagnosis import diagnose_job, print_diagnosis

    print_diagnosis(diagnose_job(_open(results), name), form)


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
        from raylab.mistakes import describe_error, find_storage_problem

        if trouble := find_storage_problem(error):
            print(f"raylab: the results can't be read or written ({trouble}); mend that and try again", file=sys.stderr)
            return 1
        # The message of an unforeseen error could quote a text: its kind and place must do.
        print(f"raylab: {describe_error(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
