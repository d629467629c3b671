"""How a sweep looks in a terminal: its live block, drawn from a snapshot, and numbers as a person reads them."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, ConsoleRenderable
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

MAX_WIDTH = 110
TITLE_WIDTH = 10
DIM = "bright_black"
# In the order in which they are shown: what has ended, what runs, what waits.
STYLES = {
    "complete": "green", "stopped": "blue", "failed": "red", "infeasible": "yellow", "running": "cyan", "waiting": DIM,
}  # fmt: skip


class Glyphs(NamedTuple):
    """What a block is drawn with."""

    rule: str
    done: str
    running: str
    waiting: str
    between: str
    dots: str
    spinner: str


UNICODE = Glyphs("─", "━", "╍", "╌", " · ", "…", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
ASCII = Glyphs("-", "#", "+", "-", ", ", "...", "|/-\\")


class Best(NamedTuple):
    """The best value of a target so far."""

    target: str
    value: float
    arm: str
    label: str


class Step(NamedTuple):
    """A piece of the preparation that runs."""

    name: str
    done: int
    total: int
    started: float


@dataclass(frozen=True)
class View:
    """What is shown of a sweep at one moment; times in seconds. `counts`, by state, add up to the planned trials, if
    it is `known` how many those are."""

    name: str
    elapsed: float
    counts: Mapping[str, int]
    known: bool
    retried: int
    pace: Sequence[str]
    longest: float | None
    best: Sequence[Best]
    resources: Sequence[str]
    steps: Sequence[Step]
    failure: str


class Block(Live):
    """Rich's live display of a sweep, drawn when told to.

    It also clears the rows into which a terminal made narrower has wrapped what was last drawn.
    """

    def __init__(self, console: Console, look: Callable[[], View]) -> None:
        self.look = look
        self.drawn: list[int] = []
        super().__init__(
            self,
            console=console,
            auto_refresh=False,
            transient=True,
            # Standard output that goes to a file or pipe stays there.
            redirect_stdout=sys.stdout.isatty(),
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """The lines, each cut to the width whatever the console does with long ones, and no more than fit."""
        lines = draw_block(self.look(), options.max_width - 1, options.ascii_only)[: max(1, options.size.height - 1)]
        self.drawn = [line.cell_len for line in lines]
        yield from lines

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Goes up over the wrapped rows, which rich does not know of, then over the block's own lines."""
        width = max(1, self.console.width)
        wrapped = sum((cells - 1) // width for cells in self.drawn if cells)
        return [
            Control(*((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * wrapped),
            *super().process_renderables(renderables),
        ]


def draw_block(view: View, width: int, ascii_only: bool = False) -> list[Text]:
    """The lines of a live block, none wider than `width` cells; the more important ones first."""
    width, glyphs = max(1, min(width, MAX_WIDTH)), ASCII if ascii_only else UNICODE
    return [fit(line, width, glyphs) for line in _draw(view, width, glyphs)]


def _draw(view: View, width: int, glyphs: Glyphs) -> Iterator[Text]:
    elapsed = show_seconds(view.elapsed)
    spin = glyphs.spinner[int(view.elapsed * 2) % len(glyphs.spinner)]
    name = fit(Text(f"{spin} {one_line(view.name) or 'sweep'}", "bold"), max(8, width - len(elapsed) - 9), glyphs)
    rule = glyphs.rule * max(1, width - name.cell_len - len(elapsed) - 8)
    edge = glyphs.rule * 2
    yield Text.assemble((f"{edge} ", DIM), name, (f" {rule} ", DIM), elapsed, (f" {edge}", DIM))
    counts, total = view.counts, sum(view.counts.values())
    if total:
        states = [
            Text(f"{count:,} {state}", STYLES[state])
            for state, count in counts.items()
            if count or state in ("complete", "running") or (state == "waiting" and view.known)
        ]
        if view.known:
            yield draw_bar(counts, width, glyphs)
        yield from flow(
            "trials", [*states, *([Text(f"{view.retried} retried")] if view.retried else [])], width, glyphs
        )
    if total > counts["waiting"]:
        longest = [] if view.longest is None else [f"longest running: {show_seconds(view.longest, exact=False)}"]
        yield from flow("pace", [Text(part) for part in [*view.pace, *longest]], width, glyphs)
    for place, best in enumerate(view.best):
        value = Text.assemble(f"{one_line(best.target)} " if best.target else "", (show_value(best.value), "bold"))
        label = [Text(one_line(best.label), DIM)] if best.label else []
        yield from flow("" if place else "best", [value, Text(f"arm {best.arm}"), *label], width, glyphs)
    if view.resources:
        yield from flow("in use", [Text(entry) for entry in view.resources], width, glyphs)
    for step in view.steps:
        share = f" {100 * step.done // step.total} % ({step.done:,} of {step.total:,})" if step.total > 1 else ""
        yield Text.assemble(("preparing".ljust(TITLE_WIDTH), DIM), one_line(step.name), share)
    if view.failure:
        yield Text.assemble(("failed".ljust(TITLE_WIDTH), STYLES["failed"]), one_line(view.failure))


def draw_bar(counts: Mapping[str, int], width: int, glyphs: Glyphs) -> Text:
    """Trials by state as a bar over the width, with the number done and planned behind it."""
    total, waiting = sum(counts.values()), counts["waiting"] + counts["running"]
    tail = f"  {total - waiting:,}/{total:,}  {100 * (total - waiting) // total} %"
    cells = max(0, width - len(tail))
    bar, before = Text(), 0
    for state in STYLES:
        after = before + counts[state]
        glyph = {"running": glyphs.running, "waiting": glyphs.waiting}.get(state, glyphs.done)
        bar.append(glyph * (cells * after // total - cells * before // total), STYLES[state])
        before = after
    return bar.append(tail)


def flow(title: str, parts: Sequence[Text], width: int, glyphs: Glyphs) -> Iterator[Text]:
    """Parts behind a title, on as many lines as they need; no part is broken."""
    line, filled = Text.assemble((title.ljust(TITLE_WIDTH), DIM)), False
    for part in parts:
        if filled and line.cell_len + len(glyphs.between) + part.cell_len > width:
            yield line
            line, filled = Text(" " * TITLE_WIDTH), False
        if filled:
            line.append(glyphs.between, DIM)
        line.append_text(part)
        filled = True
    yield line


def fit(line: Text, width: int, glyphs: Glyphs) -> Text:
    """A line cut to a width in cells."""
    if glyphs is ASCII:
        line.plain = line.plain.encode("ascii", "replace").decode()
    if line.cell_len > width:
        line.truncate(max(0, width - len(glyphs.dots)), overflow="crop")
        line.append(glyphs.dots[:width])
    return line


def one_line(text: str) -> str:
    """A text without line ends, escape codes and other characters that move the cursor."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def show_seconds(seconds: float, exact: bool = True) -> str:
    """A duration as a person says it: its two largest units, to the nearest minute where it need not be exact."""
    minutes, rest = divmod(int(seconds if exact or seconds < 60 else seconds + 30), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if exact and minutes < 10 else f"{minutes} min"


def show_value(value: float) -> str:
    """A target's value in three decimals, or in three digits where that would say nothing."""
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:.3g}"


def show_resource(name: str, used: float, total: float) -> str:
    """A resource in use, of how much."""
    return f"{one_line(name)} " + "/".join(f"{number:,.1f}".removesuffix(".0") for number in (used, total))
