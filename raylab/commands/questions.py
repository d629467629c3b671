"""The commands that ask what results show: compare, effects, correlate and optuna; `cli` takes them up."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylab.base.mistakes import JobError
from raylab.commands.options import RESULTS, FormatOption, ResultsOption, load, open_folder
from raylab.commands.output import Format, messages, output, print_rows

if TYPE_CHECKING:
    from raylab.job.specs import Job, Target
    from raylab.statistics.verdicts import Verdict

TABLES = (".csv", ".parquet", ".jsonl")
# The columns of a comparison that people see: those of a machine's format are all.
SHOWN = (
    "role",
    "label_a",
    "label_b",
    "num_seeds",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "superiority",
    "seeds_needed",
    "detectable",
)
SplitOption = Annotated[str, typer.Option(help="validation, or test once it is unsealed")]


def compare(
    source: Annotated[str, typer.Argument(help="a job's name, or a table: FILE.csv, .parquet or .jsonl")],
    arms: Annotated[
        list[str] | None, typer.Argument(help="two arms, or 'ARM vs ARM at KEY=VALUE'; default: what the job declares")
    ] = None,
    results: ResultsOption = RESULTS,
    at: Annotated[str | None, typer.Option(help="of a job: the cell, such as 'task=TASK, shots=32'")] = None,
    shots: Annotated[str | None, typer.Option(help="of a job: short for --at shots=...")] = None,
    split: SplitOption = "validation",
    arm: Annotated[str, typer.Option(help="of a table: the column of arms")] = "arm",
    seed: Annotated[str, typer.Option(help="of a table: the column of seeds, or runs: what is repeated")] = "seed",
    value: Annotated[str, typer.Option(help="of a table: the column of values")] = "value",
    draw: Annotated[str | None, typer.Option(help="of a table: the column of draws, or folds, within a seed")] = None,
    nested: Annotated[bool, typer.Option("--nested", help="draws of one name are other draws on another seed")] = False,
    lower: Annotated[bool, typer.Option("--lower", help="of a table: lower values are better")] = False,
    base: Annotated[
        str | None, typer.Option(help="of a table: each other arm with this one; default: all pairs")
    ] = None,
    form: FormatOption = Format.table,
) -> None:
    """Is an arm better? Paired on seeds: verdict, interval, test, and the seeds that would decide it."""
    if Path(source).suffix in TABLES:
        if at or shots or split != "validation":
            raise JobError([f"--at, --shots and --split are for jobs, and {source} is a table; leave them out"])
        columns = {"arm": arm, "seed": seed, "value": value, "draw": draw}
        verdicts = _compare_table(Path(source), columns, list(arms or []), base, nested, lower)
        _print_verdicts([_tell_table(verdicts)], verdicts, form, SHOWN[1:])
        return
    if base or draw or nested or lower:
        raise JobError(
            [f"--base, --draw, --nested and --lower are for tables, and '{source}' is a job; leave them out"]
        )
    _compare_job(source, list(arms or []), results, _join_cell(at, shots), split, form)


def _join_cell(at: str | None, shots: str | None) -> str | None:
    parts = [part for part in (at, f"shots={shots}" if shots else None) if part]
    return ", ".join(parts) or None


def _compare_table(
    path: Path, columns: dict[str, Any], arms: list[str], base: str | None, nested: bool, lower: bool
) -> "list[Verdict]":
    from raylab.statistics.comparisons import compare_arms
    from raylab.statistics.observations import read_observations
    from raylab.statistics.verdicts import EXPLORATORY, Verdict, tell_comparison

    found = read_observations(path, **columns)
    if unknown := [name for name in [*arms, *([base] if base else [])] if name not in found]:
        raise JobError([f"'{name}': no such arm; there are {', '.join(list(found)[:20])}" for name in unknown])
    names = arms or list(found)
    if base is not None:
        pairs = [(name, base) for name in names if name != base]
    else:
        pairs = list(itertools.combinations(names, 2))
    if not pairs or len(set(names)) < len(names):
        raise JobError([f"{path}: two arms are needed, there {'is' if len(names) == 1 else 'are'} {', '.join(names)}"])
    rows = compare_arms(found, pairs, mode="min" if lower else "max", draws="nested" if nested else "shared")
    return [Verdict(EXPLORATORY, row.a, row.b, tell_comparison(row, row.a, row.b), row) for row in rows]


def _tell_table(verdicts: "list[Verdict]") -> str:
    from raylab.statistics.verdicts import tell_family

    return tell_family(verdicts)


def _compare_job(source: str, arms: list[str], results: str, at: str | None, split: str, form: Format) -> None:
    from raylab.job.primary import split_sides
    from raylab.statistics.analysis import analyse_job, compare_named, default_target, measure_gap, tell_gap
    from raylab.statistics.verdicts import tell_verdicts

    folder = open_folder(results)
    job = _load(folder, source)
    if len(arms) == 1:
        left, right, cell = split_sides(arms[0])
        arms, at = [left, right], _join_cell(cell, None) if at is None else at
    if len(arms) not in (0, 2):
        raise JobError([f"compare: {len(arms)} arms are named; name two, or none for what the job declares"])
    target = _read_target(job, at) if at else default_target(job)
    notes: list[str] = []
    if arms:
        verdicts = [compare_named(folder, job, (arms[0], arms[1]), target, split)]
    else:
        verdicts, notes = analyse_job(folder, job, target, split)
    told = tell_verdicts(verdicts)
    if not arms and (gap := measure_gap(folder, job, target)) is not None:
        told.append(tell_gap(gap))
    _print_verdicts(told, verdicts, form, SHOWN)
    for note in notes:
        messages.print(note, highlight=False)


def _read_target(job: "Job", at: str) -> "Target":
    from raylab.job.jobs import check_target
    from raylab.job.primary import read_cell_target, split_pairs

    target = read_cell_target(job, split_pairs(at))
    if problems := check_target(job, target, "--at"):
        raise JobError(problems)
    return target


def _load(folder: Path, name: str) -> "Job":
    from raylab.results.queries import find_job

    return load(find_job(folder, name), None, None)


def _print_verdicts(told: list[str], verdicts: "list[Verdict]", form: Format, shown: tuple[str, ...]) -> None:
    from raylab.statistics.verdicts import list_verdicts

    rows = list_verdicts(verdicts)
    if form is not Format.table:
        print_rows([{k: v for k, v in row.items() if k != "role" or "role" in shown} for row in rows], form)
        return
    for line in told:
        output.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(rows) > 1:
        print_rows([{name: row[name] for name in shown} for row in rows], form)


def effects(
    name: Annotated[str, typer.Argument(help="the job's name")],
    results: ResultsOption = RESULTS,
    at: Annotated[str | None, typer.Option(help="the cell, such as 'task=TASK, shots=32'")] = None,
    split: SplitOption = "validation",
    form: FormatOption = Format.table,
) -> None:
    """What each setting does: effects and interactions of a fixed design, importances of a search."""
    from raylab.job.designs import FIXED

    folder = open_folder(results)
    job = _load(folder, name)
    if job.search.design in FIXED:
        from raylab.statistics.effects import list_effect_rows, list_effects

        found = list_effects(folder, job, _read_target(job, at) if at else None, split)
        if not found:
            raise JobError([f"effects: {name} has no arms yet that differ in one setting; run it to the end"])
        rows = list_effect_rows(found)
        columns = ("verdict", "difference", "low", "high", "p", "p_holm")
    else:
        from raylab.statistics.importances import list_importances

        if at is not None or split != "validation":
            raise JobError(
                [f"--at and --split: {name} is a search, whose importances are of its targets; leave them out"]
            )
        rows = [importance._asdict() for importance in list_importances(folder, job)]
        columns = ("method", "target", "setting", "importance", "within", "num_arms")
        messages.print("importances of the arms that the search tried; not an ablation", highlight=False)
    print_rows([{name: row[name] for name in columns} for row in rows] if form is Format.table else rows, form)


def correlate(
    name: Annotated[str, typer.Argument(help="the job's name")],
    results: ResultsOption = RESULTS,
    metric: Annotated[
        str | None, typer.Option(help="of the scores; default: the one that arms are compared by")
    ] = None,
    form: FormatOption = Format.table,
) -> None:
    """Each geometry metric against each score over arms, within and between objectives, and where it breaks down."""
    from raylab.statistics.correlations import correlate_job

    folder = open_folder(results)
    rows = correlate_job(folder, _load(folder, name), metric)
    print_rows(rows, form)
    messages.print(f"{len(rows)} correlations: of so many, one in 20 intervals leaves out 0 by chance", highlight=False)


def write_optuna(
    name: Annotated[str, typer.Argument(help="the job's name")],
    file: Annotated[Path | None, typer.Argument(help="the SQLite file to write; default: NAME.db here")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Write a job's arms as an Optuna study, and say how optuna-dashboard opens it; again while the job runs."""
    from raylab.statistics.studies import write_study

    folder = open_folder(results)
    path = file or Path(f"{name}.db")
    number = write_study(folder, _load(folder, name), path)
    messages.print(f"{path}: {number} arms", highlight=False)
    output.print(f"optuna-dashboard sqlite:///{path}", highlight=False, soft_wrap=True)


def report(
    name: Annotated[str, typer.Argument(help="the job's name")],
    results: ResultsOption = RESULTS,
    folder: Annotated[
        Path | None, typer.Option("--output", help="the folder to write; default: NAME-report here")
    ] = None,
) -> None:
    """One HTML page that needs no network: verdict, arms, settings, embeddings, costs; figures and tables as files."""
    from raylab.report.report import write_report

    where = open_folder(results)
    output.print(str(write_report(where, _load(where, name), folder or Path(f"{name}-report"))), soft_wrap=True)
