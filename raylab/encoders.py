"""The commands about the encoders that jobs made, and about encoders from elsewhere; `cli` takes them up."""

from typing import Annotated

import typer

from raylab.options import RESULTS, ResultsOption, open_folder
from raylab.output import messages, name_user, print_ranking


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

    folder = open_folder(results).resolve()
    job = load_job(find_job(folder, name))
    unseal_job(job, folder, arms or [], by=name_user(), reason=reason, tell=messages.print)
    print_ranking(job, folder, split="test")
