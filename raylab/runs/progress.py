"""What a person sees while a sweep runs: a live block in a terminal, plain lines elsewhere, on stderr; and its log."""

import contextlib
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from raylab.runs.display import STYLES, Best, Block, Step, View, one_line, show_resource, show_seconds, show_value

# The live block is drawn and the gauge read this often; plain lines of finished trials come no closer than this.
DRAW_SECONDS, GAUGE_SECONDS, LINE_SECONDS = 0.5, 2.0, 1.0
# The rate is that of the last ten minutes, or of the last 20 trials where those took longer.
WINDOW_SECONDS, WINDOW_TRIALS, MARK_SECONDS = 600.0, 20, 10.0
# A step of the preparation that took longer is worth a line each time.
LONG_STEP = 5.0

# (name, in use, total).
Gauge = Callable[[], Sequence[tuple[str, float, float]]]


class Pace:
    """Trials and tokens by time, over a recent window, of which it keeps under a hundred marks."""

    def __init__(self) -> None:
        self.trials = self.tokens = 0
        self.last = 0.0
        self.marks: deque[tuple[float, int, int]] = deque()

    def begin(self, now: float) -> None:
        """The first trial has begun: time counts from here."""
        if not self.marks:
            self.marks.append((now, 0, 0))

    def add(self, now: float, tokens: int) -> None:
        """A trial has ended."""
        self.begin(now)
        self.trials, self.tokens, self.last = self.trials + 1, self.tokens + tokens, now
        if now - self.marks[-1][0] >= MARK_SECONDS:
            self.marks.append((now, self.trials, self.tokens))
        while (
            len(self.marks) > 1
            and now - self.marks[1][0] > WINDOW_SECONDS
            and self.trials - self.marks[1][1] >= WINDOW_TRIALS
        ):
            self.marks.popleft()

    def rates(self, now: float, running: int) -> tuple[float, float] | None:
        """Trials and tokens a second. None until as many trials have ended as run: the first to end are the short ones.

        Between two ends the rates stay; they fall once an end is overdue.
        """
        if self.trials < max(2, running):
            return None
        since, trials, tokens = self.marks[0]
        seconds, count = self.last - since, self.trials - trials
        if seconds <= 0 or count <= 0:
            return None
        seconds += max(0.0, now - self.last - seconds / count)
        return count / seconds, (self.tokens - tokens) / seconds

    def time_left(self, now: float, running: int, left: int) -> float | None:
        """Seconds until `left` more trials have ended, at the rate of the window; None where that is not known."""
        rates = self.rates(now, running)
        if rates is None:
            return None
        return max(0.0, left / rates[0] - min(now - self.last, 1 / rates[0]))


class SweepProgress:
    """Counts trials by state and shows how the sweep goes. `console` writes to stderr.

    `live` is by default whether that is a terminal. Every method may be called from any thread, and no failure to
    write ends a sweep. The caller may set `name`, `targets` (their names), `planned` and `gauge`,
    which a thread of its own reads every two seconds.
    """

    def __init__(
        self,
        console: Console,
        name: str = "",
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.name, self.clock = console, name, clock
        self.targets: Sequence[str] = ()
        self.planned = self.retried = 0
        self.gauge: Gauge | None = None
        self.states: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.running: dict[str, float] = {}
        self.best: dict[int, Best] = {}
        self.failure = ""
        self.started = clock()
        self.pace = Pace()
        self.steps: dict[str, Step] = {}
        self.told: set[str] = set()
        self.resources: Sequence[str] = ()
        self.log: Path | None = None
        self.log_failed = False
        # `state` guards what is counted and is never held while writing; `writing` keeps lines and block apart.
        # Both may be taken again by a signal's handler in the thread that holds them.
        self.state, self.writing, self.ended = threading.RLock(), threading.RLock(), threading.Event()
        self.unsaid, self.latest, self.said_at = 0, "", -math.inf
        self.timer: threading.Timer | None = None
        if live is None:
            # FORCE_COLOR makes rich take a file for a terminal; a CI's terminal is a file that nobody watches.
            live = console.is_interactive and console.file.isatty() and not console.quiet and not os.environ.get("CI")
        self.live = Block(console, self.look) if live else None
        if self.live is not None:
            self.live.start(refresh=True)
            self._every(DRAW_SECONDS, self._draw)
            self._every(GAUGE_SECONDS, self._read_gauge)

    def log_to(self, path: Path) -> None:
        """From here on every plain line is also appended to a file, behind its time."""
        self.log = path

    def tell(self, what: str, done: int, total: int) -> None:
        """Progress of a step of the preparation; a line at its end."""
        with self.state:
            now = self.clock()
            step = self.steps.pop(what, Step(what, 0, total, now))
            if done < total:
                self.steps[what] = Step(what, done, total, step.started)
                return
            seconds = now - step.started
            if what in self.told and seconds < LONG_STEP:
                return
            self.told.add(what)
        self._say(f"{what}: done" + (f" in {show_seconds(seconds)}" if seconds >= LONG_STEP else ""))

    def start_trial(self, trial_id: str) -> None:
        """A trial begins."""
        with self.state:
            self.running[trial_id] = self.clock()
            self.pace.begin(self.running[trial_id])

    def keep_trial(
        self,
        row: Mapping[str, Any],
        value: float | Sequence[float | None] | None,
        sign: float | Sequence[float],
        label: str = "",
    ) -> None:
        """A trial that was done before this sweep began: it counts as done, but not in `states` or the rate."""
        with self.state:
            self.kept[row["status"]] += 1
            self._compare(row, value, sign, label)

    def finish_trial(
        self,
        row: Mapping[str, Any],
        value: float | Sequence[float | None] | None,
        sign: float | Sequence[float],
        planned: int,
        label: str = "",
    ) -> None:
        """A trial has ended with its row of `trials`; `label` names its settings.

        `value` is its target's, larger better if `sign` is 1; for several targets a list of each.
        """
        trial_id, status = row["trial_id"], row["status"]
        with self.state:
            self.running.pop(trial_id, None)
            self.states[status] += 1
            self.planned = planned
            if status != "infeasible":
                # An infeasible one takes no time: it says nothing of how fast the others go.
                self.pace.add(self.clock(), int(row.get("num_tokens") or 0))
            values = self._compare(row, value, sign, label)
            self.latest = " ".join([trial_id, status, *(show_value(v) for v in values if v is not None)])
            self.unsaid += 1
            line = self._due_line()
            if status == "failed":
                self.failure = f"{trial_id}: {row.get('error')}"
        self._say(line, above=False)
        if status == "failed":
            self._say(f"trial {trial_id} failed: {row.get('error')}", "red")

    def retry_trial(self, trial_id: str, why: str) -> None:
        """A trial that began will begin again later: it has no final state yet."""
        with self.state:
            self.running.pop(trial_id, None)
            self.retried += 1
        self._say(f"trial {trial_id} will be tried again: {why}", "yellow")

    def note(self, text: str) -> None:
        """A line about the sweep as a whole."""
        self._say(text)

    def stop(self) -> None:
        """Leaves the terminal as it was, below a line of how the sweep ended. A second call does nothing."""
        if self.ended.is_set():
            return
        self.ended.set()
        self._flush()
        if self.live is not None:
            with self.writing, contextlib.suppress(OSError):
                self.live.stop()
            self.live = None
        with self.state:
            counts = self._counts()
            seconds = show_seconds(self.clock() - self.started)
        if self.states or self.running:
            said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
            self._say(f"{self.name or 'sweep'}: {said}; {seconds}")

    def _compare(self, row: Mapping[str, Any], value: Any, sign: Any, label: str) -> list[float | None]:
        """Takes a trial's values, one a target, into the best so far."""
        values = list(value) if isinstance(value, Sequence) else [value]
        signs = list(sign) if isinstance(sign, Sequence) else [sign] * len(values)
        if row["status"] in ("complete", "stopped"):
            for index, (found, better) in enumerate(zip(values, signs, strict=True)):
                if found is None or not math.isfinite(found):
                    continue
                if index not in self.best or better * found > better * self.best[index].value:
                    self.best[index] = Best(self._target(index), found, row["arm"], label)
        return values

    def _counts(self) -> dict[str, int]:
        """Trials by state; they add up to what is planned."""
        done = self.states + self.kept
        waiting = max(0, self.planned - done.total() - len(self.running))
        return {state: done[state] for state in STYLES} | {"running": len(self.running), "waiting": waiting}

    def _due_line(self, now: bool = False) -> str:
        """The line of the trials that ended since the last one; empty where it is too early, which a timer mends."""
        if not self.unsaid or (self.live is not None and self.log is None):
            return ""
        clock = self.clock()
        if not now and clock - self.said_at < LINE_SECONDS:
            if self.timer is None:
                self.timer = threading.Timer(LINE_SECONDS, self._flush)
                self.timer.daemon = True
                self.timer.start()
            return ""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        done = (self.states + self.kept).total()
        more = f" (and {self.unsaid - 1} more)" if self.unsaid > 1 else ""
        best = ", ".join(f"{b.target} {show_value(b.value)} (arm {b.arm})".lstrip() for b in self._best())
        parts = [f"{done}/{max(self.planned, done)} {self.latest}{more}", f"best {best}" if best else ""]
        parts.append(", ".join(self._pace(clock, self._counts())))
        self.unsaid, self.said_at = 0, clock
        return f"[{show_seconds(clock - self.started)}] " + "; ".join(part for part in parts if part)

    def _flush(self) -> None:
        with self.state:
            line = self._due_line(now=True)
        self._say(line, above=False)

    def _say(self, text: str, style: str = "", *, above: bool = True) -> None:
        """Writes a line, and to the log; `above`: above a live block too, which tells of finished trials by itself."""
        line = one_line(text)
        if not line:
            return
        if above or self.live is None:
            # A terminal that is gone (its session was closed) must not end a sweep.
            with self.writing, contextlib.suppress(OSError):
                self.console.print(Text(line, style), soft_wrap=True, highlight=False)
        if self.log is None:
            return
        try:
            with self.log.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}\n")
        except OSError as error:
            if not self.log_failed:
                self.log_failed = True
                with self.writing, contextlib.suppress(OSError):
                    self.console.print(
                        Text(f"{self.log}: can't be written ({error.strerror}); the sweep goes on"), soft_wrap=True
                    )

    def _every(self, seconds: float, call: Callable[[], None]) -> None:
        def repeat() -> None:
            while not self.ended.wait(seconds):
                call()

        threading.Thread(target=repeat, daemon=True).start()

    def _draw(self) -> None:
        with self.writing, contextlib.suppress(OSError):
            if self.live is not None:
                self.live.refresh()

    def _read_gauge(self) -> None:
        """Apart from the drawing: a cluster that does not answer must not freeze the block."""
        try:
            self.resources = [show_resource(*entry) for entry in self.gauge()] if self.gauge is not None else []
        except Exception:
            self.resources = []

    def look(self) -> View:
        """What is to be seen now."""
        with self.state:
            now, counts = self.clock(), self._counts()
            return View(
                name=self.name,
                elapsed=now - self.started,
                counts=counts,
                known=self.planned > 0,
                retried=self.retried,
                pace=self._pace(now, counts) or ["time left not known yet"],
                longest=now - min(self.running.values()) if self.running else None,
                best=self._best(),
                resources=self.resources,
                steps=list(self.steps.values()),
                failure=self.failure,
            )

    def _best(self) -> list[Best]:
        """The best of the first two targets."""
        return [self.best[index] for index in sorted(self.best)[:2]]

    def _target(self, index: int) -> str:
        return self.targets[index] if index < len(self.targets) else ""

    def _pace(self, now: float, counts: Mapping[str, int]) -> list[str]:
        """Rates and time left; empty as long as they are not known."""
        running, left = counts["running"], counts["running"] + counts["waiting"]
        rates, seconds = self.pace.rates(now, running), self.pace.time_left(now, running, left)
        if rates is None or seconds is None:
            return []
        hourly, tokens = rates[0] * 3600, rates[1]
        shown = [f"{hourly:,.1f} trials/h" if hourly < 100 else f"{hourly:,.0f} trials/h"]
        shown += [f"{tokens:,.0f} tokens/s"] if tokens else []
        return [*shown, *([f"about {show_seconds(seconds, exact=False)} left"] if left else [])]
