"""How figures look: greys with markers, lines and hatches, so that none needs colour; and how they are kept."""

import io
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

GREYS = ("#000000", "#595959", "#8c8c8c", "#b3b3b3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LINES = ("-", "--", "-.", ":")
# One hue whose darkness alone tells values apart: it reads alike in grey.
SHADES = "Blues"
WIDTH = 8.4
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    # Drawn as shapes: the page holds a figure as a picture, which takes no fonts along.
    "svg.fonttype": "path",
    "svg.hashsalt": "raylab",
    # Labels are data: two dollar signs in one are no formula.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
}


def start_figure(
    rows: int = 1, columns: int = 1, *, height: float = 3.2, width: float = WIDTH, **options: Any
) -> "tuple[Figure, Any]":
    """A figure of `height` inches a row and its panels as an array of rows x columns; options as of `subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained", dpi=130)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def list_styles() -> Iterator[dict[str, str]]:
    """A grey, marker and line for each series, without end; the first 20 all differ in marker or line."""
    number = 0
    while True:
        yield {
            "color": GREYS[number % len(GREYS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }
        number += 1


def wrap_label(text: str, width: int = 38) -> str:
    """A label on lines that fit beside an axis."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=True)) or text


def label_powers(axis: "Axis") -> None:
    """Plain numbers along a logarithmic axis: its own are formulas, which `STYLE` turns off."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=True))


def write_values(
    panel: "Axes", values: Any, low: float, high: float, form: str = "{:.3f}", limit: int = 400, below: Any = None
) -> None:
    """The values of a heat map (rows x columns, shaded from `low` to `high`) into its cells, white where it is dark.

    `below`: texts of as many rows and columns that stand under them.
    """
    import numpy as np

    values = np.asarray(values, float)
    if values.size > limit:
        return
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            dark = high > low and (value - low) / (high - low) > 0.6
            text = form.format(value) + ("" if below is None else f"\n{below[row][column]}")
            panel.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def render(figure: "Figure") -> tuple[bytes, bytes]:
    """A figure as SVG and PNG; the same one gives the same bytes."""
    found = []
    # The layout takes as long as the drawing, and is the same in both. It settles in two passes: what the first one
    # makes wider or narrower moves the labels.
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        engine.execute(figure)
        figure.set_layout_engine("none")
    for form, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        stream = io.BytesIO()
        figure.savefig(stream, format=form, metadata=metadata)
        found.append(stream.getvalue())
    return found[0], found[1]
