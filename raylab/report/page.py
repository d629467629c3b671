"""The report's files: one page without scripts or network, figures as SVG and PNG, tables as CSV."""

import base64
import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylab.base.mistakes import JobError
from raylab.report.drawing import render
from raylab.report.parts import Code, Part, Row, Section, Table

PAGE = "report.html"
# An SVG of more bytes than this is shown as its PNG.
LARGEST_SVG = 300_000
# Rows of a figure's own table that the page shows.
SHOWN = 12


def write_page(sections: Sequence[Section], title: str, made: str, folder: Path) -> Path:
    """Writes a report into a folder of its own, in place of an earlier report there; gives its page.

    The folder appears whole. Raises JobError where it holds anything else, or can't be written.
    """
    if folder.exists() and not (folder / PAGE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError([f"report: {folder} is there and holds no report; name another folder with --output"])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            made_here = Path(scratch) / "new"
            _write_files(sections, title, made, made_here)
            if folder.exists():
                os.replace(folder, Path(scratch) / "old")
            os.replace(made_here, folder)
    except OSError as error:
        raise JobError([f"report: {folder} can't be written ({error.strerror}); name another with --output"]) from None
    return folder / PAGE


def _write_files(sections: Sequence[Section], title: str, made: str, folder: Path) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    for name in ("figures", "tables"):
        (folder / name).mkdir(parents=True)
    # Labels of classes and arms are data: they are escaped.
    environment = Environment(
        loader=PackageLoader("raylab.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    told = [
        {"name": section.name, "title": section.title, "lead": section.lead,
         "parts": [_write_part(part, folder) for part in section.parts]}
        for section in sections
    ]  # fmt: skip
    text = environment.get_template(PAGE.replace("report", "page")).render(sections=told, title=title, made=made)
    (folder / PAGE).write_text(text)


def _write_part(part: Part, folder: Path) -> dict[str, Any]:
    if isinstance(part, str):
        return {"kind": "text", "text": part}
    if isinstance(part, Code):
        return {"kind": "code", "text": part.text}
    if isinstance(part, Table):
        return {"kind": "table", **_write_table(part, folder)}
    svg, png = render(part.figure)
    files = {form: f"figures/{part.name}.{form}" for form in ("svg", "png")}
    (folder / files["svg"]).write_bytes(svg)
    (folder / files["png"]).write_bytes(png)
    raster = part.raster or len(svg) > LARGEST_SVG
    kind, content = ("image/png", png) if raster else ("image/svg+xml", svg)
    width, height = (round(inches * 96) for inches in part.figure.get_size_inches())
    return {
        "kind": "plot", "title": part.title, "alt": part.alt, "width": width, "height": height, **files,
        "source": f"data:{kind};base64,{base64.b64encode(content).decode()}",
        "table": _write_table(Table(part.name, part.title, part.rows, shown=SHOWN), folder),
    }  # fmt: skip


def _write_table(table: Table, folder: Path) -> dict[str, Any]:
    file = f"tables/{table.name}.csv"
    (folder / file).write_text(_write_csv(table.rows), newline="")
    keys = dict(table.columns or {key: key.replace("_", " ") for key in (table.rows[0] if table.rows else ())})
    columns = [
        {"heading": heading, "number": all(_is_number(row[key]) for row in table.rows)} for key, heading in keys.items()
    ]
    listed = [show_column([row[key] for row in table.rows[: table.shown]]) for key in keys]
    rows = list(zip(*listed, strict=True))
    return {
        "title": table.title, "columns": columns, "rows": rows, "file": file, "left": len(table.rows) - len(rows),
    }  # fmt: skip


def _write_csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: json.dumps(v) if isinstance(v, (list, dict)) else v for key, v in row.items()})
    return stream.getvalue()


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def show_column(values: Sequence[Any]) -> list[str]:
    """A column for people: fractions of its numbers as far as they tell something, of the same length."""
    sizes = [abs(value) for value in values if isinstance(value, float) and value == value and value != 0]
    fixed = bool(sizes) and max(sizes) < 10_000 and min(sizes) >= 1e-3
    places = (
        next((places for limit, places in ((10, 3), (100, 2), (10_000, 1)) if max(sizes) < limit), 0) if fixed else 0
    )
    return [f"{value:.{places}f}" if fixed and isinstance(value, float) and value == value else _show(value)
            for value in values]  # fmt: skip


def _show(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)
