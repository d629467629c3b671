"""What commands print: rows in the asked format, arms ranked; answers on stdout, messages on stderr."""

import getpass
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from raylab.base.mistakes import JobError
from raylab.store.storage import name_results

# Tables keep their shape in a pipe or file, where rich would take 80 columns.
output = Console(width=None if sys.stdout.isatty() else 140)
messages = Console(stderr=True, soft_wrap=True)


class Format(StrEnum):
    """How rows are printed."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"
    arrow = "arrow"


def print_rows(rows: Any, form: Format) -> None:
    """Rows (an Arrow table, or mappings of one set of keys) on stdout, in the asked format."""
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
    # Arrow's own conversion from Python loads pandas: only where an Arrow format is asked for.
    import pyarrow as pa

    table = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
    if form is Format.csv:
        import pyarrow.csv

        # What CSV has no form for (an interval, a list) is written as text.
        for index, field in enumerate(table.schema):
            if pa.types.is_nested(field.type) or pa.types.is_interval(field.type) or pa.types.is_binary(field.type):
                texts = [None if value is None else str(value) for value in table.column(index).to_pylist()]
                table = table.set_column(index, field.name, pa.array(texts, pa.string()))
        pa.csv.write_csv(table, sys.stdout.buffer)
    elif form is Format.parquet:
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, sys.stdout.buffer)
    else:
        with pa.ipc.new_stream(sys.stdout.buffer, table.schema) as writer:
            writer.write_table(table)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(value: Any, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{value.mean:{sign}.3f}"
    return text if value.num_seeds < 2 else f"{text} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def tell_submitted(name: str, address: str, submission_id: str) -> None:
    """Ray's id of a job on stdout, and how to follow it."""
    print(submission_id, flush=True)
    messages.print(
        f"submitted; follow it with: {shlex.join(['raylab', 'logs', name, '--address', address, '--follow'])}",
        highlight=False,
    )


def name_user() -> str:
    """Who runs this process, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def print_log(find: Callable[[], Path], every: float | None) -> None:
    """A job's log on stdout; where it is to be followed, what is added too, `every` so many seconds, until Ctrl-C.

    `find()` gives the file as it is now: a copy of one at a URL. Raises JobError where there is none.
    """
    told = 0
    while True:
        path = find()
        try:
            with path.open(errors="replace") as stream:
                stream.seek(told if told <= path.stat().st_size else 0)  # else begun anew
                print(stream.read(), end="", flush=True)
                told = stream.tell()
        except OSError:
            if not told:
                raise JobError([f"job {path.parent.name}: no log yet ({path}); 'raylab run' writes it"]) from None
        if every is None:
            return
        time.sleep(every)


def _is_chosen(job: Any, table: str) -> bool:
    from raylab.job.settings import possible_values

    return table == "scores" and "validation" in possible_values(job, "evaluate.selection")


def print_ranking(job: Any, results: Path, split: str = "validation") -> None:
    """Arms by cell on stdout: value, difference to the base arm, held-out measures."""
    from raylab.job.settings import resolve_target
    from raylab.results.queries import list_ranked
    from raylab.results.ranking import find_front, label_arms, list_cells, rank_arms, summarise_heldout
    from raylab.results.tables import read_trial
    from raylab.runs.preparation import name_point, prepare
    from raylab.search.search import is_current

    preparation = prepare(job, results)
    base, _ = name_point(preparation, {})
    # One row at a time: of thousands, all would fill the memory.
    trials = {row["arm"]: row["trial_id"] for row in list_ranked(results, job.name)}
    arms = {base}
    for arm, trial_id in trials.items():
        last = read_trial(results, job.name, trial_id)
        if last is not None and is_current(job, last, lambda values: name_point(preparation, values)[0]):
            arms.add(arm)
    for table, cell, mode in list_cells(job):
        ranked = rank_arms(results, job, table, cell, mode, base, split, arms)
        if not ranked:
            continue
        named = ", ".join(f"{k}={v}" for k, v in cell.items() if v is not None)
        seeds = max(row.value.num_seeds for row in ranked)
        note = ", C and steps chosen on the validation rows" if _is_chosen(job, table) else ""
        grid = Grid(title=f"{job.name}, {split}: {named}; mean over draws and {seeds} seed(s), 95 % t interval{note}")
        for column in ("arm", "settings", "value", "difference to base"):
            grid.add_column(column, overflow="fold")
        for row in ranked:
            grid.add_row(
                row.arm, row.label, _interval(row.value), _interval(row.difference, True) if row.difference else ""
            )
        output.print(grid)
    scored = [cell for table, cell, _ in list_cells(job) if table == "scores"]
    for name, values in (("frozen_layers", job.evaluate.frozen_layers), ("probe", job.evaluate.probes)):
        if more := [value for value in values if value not in {cell[name] for cell in scored}]:
            output.print(f"scored too, see table scores: {name} {', '.join(more)}", highlight=False)
    if len(job.search.targets) > 1 and (front := find_front(results, job, base, split, arms)):
        told = [(resolve_target(job, target), target.mode) for target in job.search.targets]
        names = [", ".join(f"{k}={v}" for k, v in cell.items() if v is not None) + f" ({mode})" for cell, mode in told]
        grid = Grid(title=f"{job.name}, {split}: Pareto front, the arms that no other beats on every target")
        for column in ("arm", "settings", *names):
            grid.add_column(column, overflow="fold")
        for member in front:
            grid.add_row(member.arm, member.label, *(_interval(value) for value in member.values))
        output.print(grid)
    heldout = {arm: found for arm, found in summarise_heldout(results, job).items() if arm in arms}
    if heldout and split == "validation":
        titles = {"mlm_loss": "MLM loss", "unigram_entropy": "unigram entropy", "retrieval_error": "retrieval error",
                  "retrieval_error_change": "change of it", "category_accuracy": "category accuracy"}  # fmt: skip
        titles = {name: title for name, title in titles.items() if any(name in found for found in heldout.values())}
        grid = Grid(title="held-out measures at the end of pre-training, validation documents, mean over seeds")
        labels = label_arms(results, job)
        for title in ("arm", "settings", *titles.values()):
            grid.add_column(title, overflow="fold")
        for arm, measures in heldout.items():
            cells = (_interval(measures[name], name.endswith("change")) if name in measures else "" for name in titles)
            grid.add_row(arm, labels.get(arm, ""), *cells)
        output.print(grid)
    output.print(
        f'tables: {name_results(results)}/{job.name}; ask them with: raylab query "select * from trials"',
        highlight=False,
    )


def print_diagnosis(rows: list[dict[str, Any]], form: Format) -> None:
    """All rows in a format for machines; as a table, what was found or could not be judged, and how many were not."""
    if form is Format.json:
        print_rows(rows, form)
        return
    told = [
        row | {"found": "not judged" if row["found"] is None else row["found"],
               "evidence": ", ".join(f"{name}={value:.4g}" for name, value in row["evidence"].items()),
               "missing": ", ".join(row["missing"])}
        for row in rows
        if form is not Format.table or row["found"] is not False
    ]  # fmt: skip
    if form is not Format.table:
        told = [row | {"found": None if row["found"] == "not judged" else row["found"]} for row in told]
    if told:
        print_rows(told, form)
    if form is Format.table:
        clear = sum(row["found"] is False for row in rows)
        print(f"{clear} of {len(rows)} signatures were looked for and not found")
