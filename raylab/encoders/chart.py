"""The chart of a profile, as PNG or SVG; it can be read in grey."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylab.base.mistakes import JobError

ENDINGS = (".png", ".svg")
# Of the batches, smallest first: a grey, a marker and a line each, so that none needs colour; the first 28 all differ.
GREYS = ("#000000", "#4d4d4d", "#808080", "#a6a6a6")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")


def check_chart(path: Path) -> None:
    """Raises JobError, before anything is measured, where a chart can't be written as `path`."""
    if path.suffix not in ENDINGS:
        raise JobError([f"--plot {path}: must end with {' or '.join(ENDINGS)}"])
    if not path.absolute().parent.is_dir():
        raise JobError([f"--plot {path}: its folder is not there; make it first"])


def plot_profile(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Latency (p50, and p95 as a thin line up) and throughput over length, a column for each device and precision.

    Hollow marks: the text's embedding is kept. Raises JobError.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    columns = list(dict.fromkeys((row["device"], row["precision"]) for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    lengths = sorted({row["length"] for row in rows if row["length"] is not None})
    figure = Figure(figsize=(1.6 + 3.2 * len(columns), 6.4), layout="constrained", dpi=150)
    panels = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for column, (device, precision) in enumerate(columns):
        here = [r for r in rows if (r["device"], r["precision"]) == (device, precision) and r["p50_ms"] is not None]
        for number, batch in enumerate(batches):
            colour, marker, line = (style[number % len(style)] for style in (GREYS, MARKERS, LINES))
            found = [row for row in here if row["batch"] == batch]
            encoded = [row for row in found if row["work"] == "encode"]
            label = f"batch of {batch}"
            # Else one line up would hide another.
            aside = 1 + 0.2 * (number - (len(batches) - 1) / 2) / max(len(batches) - 1, 4)
            x = [row["length"] * aside for row in encoded]
            how = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4.5, "linewidth": 1.4}
            for place, row in zip(x, encoded, strict=True):
                panels[0][column].plot([place] * 2, [row["p50_ms"], row["p95_ms"]], color=colour, linewidth=0.8)
            panels[0][column].plot(x, [row["p50_ms"] for row in encoded], label=label, **how)
            panels[1][column].plot(x, [row["texts_per_s"] for row in encoded], **how)
            for row in found:
                if row["work"] == "kept":
                    for panel, value in zip(panels[:, column], ("p50_ms", "texts_per_s"), strict=True):
                        hollow = {"color": colour, "marker": marker, "markersize": 5.5, "markerfacecolor": "white"}
                        panel.plot([2 * lengths[-1] * aside], [row[value]], **hollow)
        panels[0][column].set_title(f"{device}, {precision}", fontsize=10)
        panels[1][column].set_xlabel("tokens a text; kept: its embedding is there")
    for panel in panels.flat:
        panel.set_xscale("log", base=2)
        panel.set_xlim(lengths[0] / 1.3, 2 * lengths[-1] * 1.3)
        panel.set_yscale("log")
        panel.set_xticks([*lengths, 2 * lengths[-1]], [*map(str, lengths), "kept"])
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(axis="y", color="#e0e0e0", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds a batch, p50 to p95")
    panels[1][0].set_ylabel("texts a second")
    handles, labels = panels[0][0].get_legend_handles_labels()
    wide = min(len(labels), 3 * len(columns))  # more would not fit beside each other
    figure.legend(handles, labels, loc="outside lower center", ncols=wide, frameon=False, fontsize=9)
    figure.suptitle(f"{title}: time to classify texts", fontsize=11)
    try:
        figure.savefig(path)
    except OSError as error:
        raise JobError([f"--plot {path}: can't be written ({error.strerror}); name another place"]) from None
