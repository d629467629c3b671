"""The commands about the encoders that jobs made, and about encoders from elsewhere; `cli` takes them up."""

from pathlib import Path
from typing import Annotated

import typer

from raylab.base.mistakes import JobError
from raylab.commands.launch import launch
from raylab.commands.options import RESULTS, DataOption, FormatOption, ResultsOption, SetOption, load, open_folder
from raylab.commands.output import Format, messages, name_user, print_ranking, print_rows


def unseal(
    name: Annotated[str, typer.Argument(help="the job's name")],
    arms: Annotated[list[str] | None, typer.Argument(help="arms; else all that are ranked")] = None,
    results: ResultsOption = RESULTS,
    reason: Annotated[str, typer.Option(help="why, for the record")] = "",
) -> None:
    """Score the test split from the kept encoders; each access is recorded."""
    from raylab.encoders.unseal import unseal_job
    from raylab.job.jobs import load_job
    from raylab.results.queries import find_job

    folder = open_folder(results).resolve()
    job = load_job(find_job(folder, name))
    unseal_job(job, folder, arms or [], by=name_user(), reason=reason, tell=messages.print)
    print_ranking(job, folder, split="test")


def export(
    trial: Annotated[str, typer.Argument(help="the id of a complete trial")],
    directory: Annotated[Path, typer.Argument(help="where it is written: a new or empty folder")],
    results: ResultsOption = RESULTS,
) -> None:
    """Write a trial's encoder as transformers and sentence-transformers load it, with a model card."""
    from raylab.encoders.export import export_trial

    export_trial(open_folder(results).resolve(), trial, directory, lambda line: messages.print(line, highlight=False))
    messages.print(f"{directory}: written; its README.md says what made it", highlight=False)


def evaluate(
    encoders: Annotated[list[str], typer.Argument(help="ENCODER... JOB.yaml: names, directories or ids of trials")],
    results: ResultsOption = RESULTS,
    data: DataOption = None,
    overrides: SetOption = None,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster; else Ray starts here")] = None,
    here: Annotated[bool, typer.Option("--here", help="every trial in this process, without Ray")] = False,
) -> None:
    """Score encoders as they are, without pre-training, on a job's corpus; ends with them ranked."""
    from raylab.encoders.lineup import check_starts, line_up

    *names, path = encoders
    if not names or not path.endswith((".yaml", ".yml")):
        raise JobError(["evaluate: give one or more encoders, then a job file: raylab evaluate ENCODER... JOB.yaml"])
    folder = open_folder(results).resolve()
    job = line_up(load(Path(path), data, overrides), names, folder)
    check_starts(job, folder)
    messages.print(f"job {job.name}", highlight=False)
    launch(job, results, address, here)


def profile(
    encoder: Annotated[str, typer.Argument(help="a Hugging Face name, a directory, or the id of a complete trial")],
    results: ResultsOption = RESULTS,
    devices: Annotated[str | None, typer.Option(help="cpu, cuda; default: what is here")] = None,
    precisions: Annotated[str, typer.Option(help="of float32 and bf16")] = "float32,bf16",
    batches: Annotated[str, typer.Option(help="texts at once")] = "1,8,32",
    lengths: Annotated[str | None, typer.Option(help="tokens a text; default: 32,128,512 as far as it goes")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed calls of each, after a warm-up")] = 30,
    seconds: Annotated[float, typer.Option(min=0, help="after so many, 3 calls are enough")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; default: torch's own choice")] = None,
    plot: Annotated[Path | None, typer.Option(help="a chart too, as FILE.png or FILE.svg")] = None,
    form: FormatOption = Format.table,
) -> None:
    """Measure an encoder's latency, throughput and memory, and what a kept embedding saves."""
    from raylab.encoders.chart import check_chart, plot_profile

    if plot is not None:
        check_chart(plot)
    import torch

    from raylab.encoders.profiles import Load, find_encoder, list_devices, profile_encoder, read_names, read_numbers

    wanted = Load(
        read_names(devices) if devices else list_devices(),
        read_names(precisions),
        read_numbers("--batches", batches),
        read_numbers("--lengths", lengths) if lengths else None,
        repeats,
        seconds,
    )
    path = find_encoder(encoder, lambda: open_folder(results).resolve(), messages.print)
    if threads is not None:
        torch.set_num_threads(threads)
    rows = profile_encoder(path, wanted, lambda line: messages.print(line, highlight=False))
    print_rows(rows, form)
    messages.print(f"cpu: {torch.get_num_threads()} threads", highlight=False)
    if plot is not None:
        plot_profile(rows, encoder if len(encoder) <= 40 else "/".join(Path(encoder).parts[-2:]), plot)
        messages.print(f"{plot}: written", highlight=False)
