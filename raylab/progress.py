"""What a person sees while a sweep runs: one live line in a terminal, plain lines elsewhere; all on stderr."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class SweepProgress:
    """Counts trials by state and shows the best value so far. `console` writes to stderr."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.states: Counter[str] = Counter()
        self.running = 0
        self.best: tuple[float, str] | None = None
        self.started = time.monotonic()
        self.bar: Progress | None = None
        self.tasks: dict[str, Any] = {}
        if console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self.bar.start()

    def tell(self, what: str, done: int, total: int) -> None:
        """Progress of the preparation; plain output gets one line at the end of each piece of work."""
        if self.bar is None:
            if done >= total and what not in self.tasks:
                self.tasks[what] = True
                self.console.print(f"{what}: done")
            return
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total, note="")
        self.bar.update(self.tasks[what], completed=done, total=total)

    def start_trial(self, trial_id: str) -> None:
        """A trial begins."""
        self.running += 1

    def finish_trial(self, row: Mapping[str, Any], value: float | None, sign: float, planned: int) -> None:
        """A trial has ended with its row of `trials`; `value` is its target's, larger better if `sign` is 1."""
        self.running -= 1
        self.states[row["status"]] += 1
        if value is not None and (self.best is None or sign * value > sign * self.best[0]):
            self.best = (value, row["arm"])
        done = sum(self.states.values())
        states = ", ".join(f"{count} {state}" for state, count in sorted(self.states.items()))
        best = f"best {self.best[0]:.3f} (arm {self.best[1]})" if self.best else ""
        if self.bar is not None:
            if "trials" not in self.tasks:
                self.tasks["trials"] = self.bar.add_task("trials", total=planned, note="")
            self.bar.update(self.tasks["trials"], completed=done, total=max(planned, done), note=f"{states}; {best}")
        else:
            shown = "" if value is None else f" {value:.3f}"
            seconds = time.monotonic() - self.started
            self.console.print(
                f"[{seconds:6.0f} s] {done}/{planned} {row['trial_id']} {row['status']}{shown}; {best}", highlight=False
            )
        if row["status"] == "failed":
            self.console.print(f"trial {row['trial_id']} failed: {row['error']}", style="red", highlight=False)

    def retry_trial(self, trial_id: str, why: str) -> None:
        """A trial goes back to those that wait."""
        self.running -= 1
        self.note(f"trial {trial_id}: {why}")

    def note(self, text: str) -> None:
        """A line about the sweep as a whole."""
        self.console.print(text, highlight=False)

    def stop(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
