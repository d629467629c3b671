"""A job run for a person: its progress, its ranking, and how to go on where it ended early."""

import shlex
from typing import Any

import typer

from raylab.base.imports import quick_imports
from raylab.base.mistakes import JobError
from raylab.commands.options import RESULTS, open_folder
from raylab.commands.output import messages, print_ranking


def is_dashboard(address: str | None) -> bool:
    """Whether an address is that of a cluster's dashboard, not of its Ray."""
    return address is not None and address.startswith(("http://", "https://"))


def launch(job: Any, where: str, address: str | None, here: bool) -> None:
    """Runs a job, or what is missing of it, as a command does: live progress, then the arms ranked.

    Ends the command with code 1 where something failed or was interrupted.
    """
    if is_dashboard(address):
        raise JobError(
            [f"--address {address}: a dashboard takes jobs by 'raylab submit'; 'run' joins a Ray (auto, IP:PORT)"]
        )
    with quick_imports():
        from raylab.runs.progress import SweepProgress
        from raylab.runs.sweep import run_job
        from raylab.store.storage import LOG, push

    results = open_folder(where).resolve()
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
