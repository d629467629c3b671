"""What a person sees of a sweep: counts, rates, plain lines, the log, and the live block in a terminal."""

import contextlib
import fcntl
import io
import math
import os
import pty
import random
import struct
import subprocess
import sys
import termios
import textwrap
import time
from datetime import datetime

import pytest
from rich.console import Console

from raylab.runs.display import draw_block, show_seconds
from raylab.runs.progress import Pace, SweepProgress

ESCAPE = "\x1b"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def plain(clock):
    """A progress that writes plain lines; `lines()` are those so far."""
    progress = SweepProgress(Console(file=io.StringIO(), soft_wrap=True), "spans", clock=clock)
    progress.lines = lambda: progress.console.file.getvalue().splitlines()
    yield progress
    progress.stop()


def row(number, status="complete", **more):
    """A row of `trials`."""
    return {"trial_id": f"arm{number}-0", "arm": f"arm{number}", "status": status, "error": None, **more}


def seen(progress, width=80):
    """The live block as plain text."""
    return "\n".join(line.plain for line in draw_block(progress.look(), width))


def run_trials(progress, clock, count, seconds, planned, first=0):
    """One trial after another."""
    for number in range(first, first + count):
        progress.start_trial(f"arm{number}-0")
        clock.now += seconds
        progress.finish_trial(row(number, num_tokens=6000), number / 1000, 1.0, planned)


def test_states_add_up_to_what_is_planned(plain):
    draw, planned, open_trials, number = random.Random(0), 50, [], 0
    plain.planned = planned
    for kept in range(5):
        plain.keep_trial(row(kept + 1000), 0.5, 1.0)
    while plain.look().counts["waiting"] or open_trials:
        if plain.look().counts["waiting"] and (len(open_trials) < 4 or draw.random() < 0.3):
            plain.start_trial(f"arm{number}-0")
            open_trials.append(number)
            number += 1
        elif draw.random() < 0.1:
            plain.retry_trial(f"arm{open_trials.pop(0)}-0", "its node was lost")
        else:
            status = draw.choice(["complete", "stopped", "failed", "infeasible"])
            plain.finish_trial(row(open_trials.pop(0), status, error="Error: x"), 0.1, 1.0, planned)
        counts = plain.look().counts
        assert sum(counts.values()) == planned
        assert counts["running"] == len(open_trials)
    assert plain.states.total() == planned - 5
    assert plain.retried == number - plain.states.total() > 0


def test_more_trials_than_planned_still_add_up(plain, clock):
    run_trials(plain, clock, 3, 5, planned=2)
    assert plain.lines()[-1].startswith("[15 s] 3/3 arm2-0 complete")
    assert "3/3  100 %" in seen(plain)


def test_best_is_of_finite_values_of_trials_that_worked(plain, clock):
    plain.targets = ("f1_macro", "uniformity", "third")
    plain.finish_trial(row(0), [math.nan, None, 1.0], [1, -1, 1], 9)
    plain.finish_trial(row(1, "failed", error="Error: x"), [0.99, -9.0, 1.0], [1, -1, 1], 9)
    assert not seen(plain).count("f1_macro")
    plain.finish_trial(row(2), [0.5, -1.0, 1.0], [1, -1, 1], 9, "max_span=[64]")
    plain.finish_trial(row(3, "stopped"), [0.4, -2.5, 1.0], [1, -1, 1], 9, "max_span=[128]")
    plain.keep_trial(row(4), [0.3, -0.1, 1.0], [1, -1, 1])
    lines = [line.split() for line in seen(plain, 110).splitlines() if "arm " in line]
    assert lines == [
        ["best", "f1_macro", "0.500", "·", "arm", "arm2", "·", "max_span=[64]"],
        ["uniformity", "-2.500", "·", "arm", "arm3", "·", "max_span=[128]"],
    ]


def test_plain_lines_say_state_value_best_rate_and_time_left(plain, clock):
    plain.targets = ("f1_macro",)
    run_trials(plain, clock, 3, 600, planned=10)
    plain.finish_trial(row(3, "infeasible"), None, 1.0, 10)
    plain.stop()
    plain.stop()
    assert plain.lines() == [
        "[10 min] 1/10 arm0-0 complete 0.000; best f1_macro 0.000 (arm arm0)",
        "[20 min] 2/10 arm1-0 complete 0.001; best f1_macro 0.001 (arm arm1); "
        "6.0 trials/h, 10 tokens/s, about 1 h 20 min left",
        "[30 min] 3/10 arm2-0 complete 0.002; best f1_macro 0.002 (arm arm2); "
        "6.0 trials/h, 10 tokens/s, about 1 h 10 min left",
        "[30 min] 4/10 arm3-0 infeasible; best f1_macro 0.002 (arm arm2); "
        "6.0 trials/h, 10 tokens/s, about 1 h 00 min left",
        "spans: 3 complete, 1 infeasible, 6 waiting; 30 min",
    ]


def test_thousands_of_short_trials_make_few_lines_and_lose_no_failure(plain, clock):
    for number in range(3000):
        failed = number % 100 == 7
        plain.start_trial(f"arm{number}-0")
        clock.now += 1 / 128
        plain.finish_trial(row(number, "failed" if failed else "complete", error="Error: x"), 0.5, 1.0, 3000)
    plain.stop()
    failures = [line for line in plain.lines() if line.startswith("trial ")]
    assert failures == [f"trial arm{number}-0 failed: Error: x" for number in range(7, 3000, 100)]
    assert 10 < len(plain.lines()) - len(failures) < 40
    assert "] 3000/3000 arm2999-0 complete" in plain.lines()[-2]
    assert plain.lines()[-1] == "spans: 2970 complete, 30 failed; 23 s"
    # What is kept does not grow with the trials.
    assert len(plain.pace.marks) < 100
    assert not plain.running


def test_a_line_that_came_too_early_is_written_without_another_trial(plain, clock):
    run_trials(plain, clock, 2, 0.0, planned=9)
    assert len(plain.lines()) == 1
    until = time.monotonic() + 20
    while len(plain.lines()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert "2/9 arm1-0" in plain.lines()[1]


def test_marks_stay_few_with_long_trials_too():
    pace, now = Pace(), 0.0
    for number in range(5000):
        now += (0.01, 30, 4000)[number // 100 % 3]
        pace.add(now, 1)
        assert len(pace.marks) < 100


def test_time_left_is_unknown_first_then_counts_down_then_grows_when_overdue(plain, clock):
    plain.planned = 10
    assert "pace" not in seen(plain)
    run_trials(plain, clock, 1, 600, planned=10)
    assert "time left not known yet" in seen(plain)
    run_trials(plain, clock, 1, 600, planned=10, first=1)
    plain.start_trial("arm2-0")
    assert "6.0 trials/h · 10 tokens/s · about 1 h 20 min left" in seen(plain)
    clock.now += 300
    assert "6.0 trials/h · 10 tokens/s · about 1 h 15 min left" in seen(plain)
    clock.now += 1500  # 20 minutes overdue: 2 trials in 40 minutes
    assert "3.0 trials/h · 5 tokens/s · about 2 h 20 min left" in seen(plain)
    assert "longest running: 30 min" in seen(plain)


def test_no_rate_from_only_the_first_of_many_that_run(plain, clock):
    plain.planned = 100
    for number in range(8):
        plain.start_trial(f"arm{number}-0")
    clock.now += 60
    for number in range(3):
        plain.finish_trial(row(number), 0.5, 1.0, 100)
    assert "not known yet" in seen(plain)


def test_the_rate_is_a_recent_one(plain, clock):
    run_trials(plain, clock, 200, 30, planned=300)
    assert "120 trials/h" in seen(plain)
    run_trials(plain, clock, 30, 3600, planned=300, first=200)
    assert "1.0 trials/h" in seen(plain)
    assert "about 2 d 22 h left" in seen(plain)


def test_infeasible_trials_make_nothing_look_fast(plain, clock):
    plain.start_trial("arm0-0")
    for number in range(1, 50):
        plain.start_trial(f"arm{number}-0")
        plain.finish_trial(row(number, "infeasible"), None, 1.0, 100)
    assert "not known yet" in seen(plain)


def test_no_bar_before_it_is_known_how_many_are_planned(plain):
    plain.start_trial("arm0-0")
    assert seen(plain).splitlines()[1] == "trials    0 complete · 1 running"
    plain.planned = 4
    assert "0/4  0 %" in seen(plain).splitlines()[1]


def test_retried_trial_leaves_running_and_comes_again(plain, clock):
    plain.planned = 4
    plain.start_trial("arm0-0")
    plain.retry_trial("arm0-0", "its node was lost")
    assert plain.lines() == ["trial arm0-0 will be tried again: its node was lost"]
    assert "0 running · 4 waiting · 1 retried" in seen(plain, 100)
    plain.start_trial("arm0-0")
    assert "1 running · 3 waiting" in seen(plain)
    plain.finish_trial(row(0), 0.5, 1.0, 4)
    assert dict(plain.states) == {"complete": 1}


def test_steps_are_told_once_unless_they_are_long(plain, clock):
    for _ in range(3):
        plain.tell("training the tokenizer", 0, 1)
        plain.tell("training the tokenizer", 1, 1)
    plain.tell("tokenising documents", 4000, 10_000)
    assert "preparing tokenising documents 40 % (4,000 of 10,000)" in seen(plain)
    clock.now += 3900
    plain.tell("tokenising documents", 10_000, 10_000)
    assert "preparing" not in seen(plain)
    assert plain.lines() == ["training the tokenizer: done", "tokenising documents: done in 1 h 05 min"]


def test_errors_can_neither_break_lines_nor_style_them(plain, clock):
    error = "Error: [/bold] [red] :smile:\nsecond\tline \x1b[2J\r end " + "long " * 100
    plain.finish_trial(row(0, "failed", error=error), None, 1.0, 2)
    line = plain.lines()[-1]
    assert line.startswith("trial arm0-0 failed: Error: [/bold] [red] :smile: second line [2J end long")
    assert ESCAPE not in plain.console.file.getvalue()
    assert ESCAPE not in seen(plain)
    assert seen(plain).splitlines()[-1].startswith("failed    arm0-0: Error: [/bold] [red]")


@pytest.mark.parametrize("width", [1, 12, 30, 60, 80, 120, 200])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_block_fits_every_width(plain, clock, width, ascii_only):
    plain.name, plain.targets = "名前 of a job that is rather long " * 3, ("question_type f1_macro",)
    plain.gauge = lambda: [("GPU", 3, 4), ("CPU", 6, 16), ("memory", 12.34, 64)]
    plain._read_gauge()
    plain.tell("tokenising documents", 1, 1000)
    run_trials(plain, clock, 40, 77, planned=4000)
    plain.finish_trial(row(41, "failed", error="Error: too long " * 30), None, 1.0, 4000)
    plain.finish_trial(row(42), 0.9, 1.0, 4000, "learning_rate=5e-05, " * 9)
    lines = draw_block(plain.look(), width, ascii_only)
    assert max(line.cell_len for line in lines) <= width
    if ascii_only:
        assert all(line.plain.isascii() for line in lines)
    # A console that leaves long lines alone, and one that would break them, write the same.
    for soft in (True, False):
        console = Console(file=io.StringIO(), width=width, soft_wrap=soft)
        for line in lines:
            console.print(line)
        assert console.file.getvalue().splitlines() == [line.plain for line in lines]
    if width >= 60:
        shown = " ".join(line.plain for line in lines)
        for part in ("42/4,000", "41 complete", "1 failed", "3,958 waiting", "GPU 3/4",
                     "CPU 6/16", "memory 12.3/64", "0.900", "trials/h", "failed    arm41-0"):  # fmt: skip
            assert part in shown


def test_bar_has_the_shares_of_the_states(plain, clock):
    plain.planned = 40
    for number in range(30):
        plain.start_trial(f"arm{number}-0")
    for number in range(20):
        plain.finish_trial(row(number, ("complete", "stopped")[number % 2]), 0.5, 1.0, 40)
    bar = draw_block(plain.look(), 53)[1].plain
    assert bar == "━" * 20 + "╍" * 10 + "╌" * 10 + "  20/40  50 %"


def test_log_gets_every_plain_line_with_its_time(plain, clock, tmp_path):
    path = tmp_path / "sweep.log"
    plain.note("before")
    plain.log_to(path)
    plain.note("two\nlines")
    run_trials(plain, clock, 2, 60, planned=2)
    plain.stop()
    times, lines = zip(*(line.split(" ", 1) for line in path.read_text().splitlines()), strict=True)
    assert list(lines) == plain.lines()[1:]
    assert lines[0] == "two lines"
    assert all(datetime.fromisoformat(when).tzinfo is not None for when in times)


def test_a_log_that_cannot_be_written_is_told_of_once(plain, clock, tmp_path):
    plain.log_to(tmp_path / "missing" / "sweep.log")
    plain.note("one")
    plain.note("two")
    assert [line for line in plain.lines() if "can't be written" not in line] == ["one", "two"]
    assert len(plain.lines()) == 3
    (tmp_path / "missing").mkdir()
    plain.note("three")
    assert plain.log.read_text().endswith(" three\n")


def test_a_terminal_that_is_gone_ends_nothing(clock, tmp_path):
    outer, inner = pty.openpty()
    stream = os.fdopen(inner, "w")
    progress = SweepProgress(Console(file=stream), live=False, clock=clock)
    progress.log_to(tmp_path / "sweep.log")
    os.close(outer)
    with pytest.raises(OSError, match="output error"):
        print("x", file=stream, flush=True)
    progress.note("still there")
    progress.stop()
    assert "still there" in (tmp_path / "sweep.log").read_text()
    with contextlib.suppress(OSError):
        stream.close()


def test_a_file_is_no_terminal_even_in_colour():
    progress = SweepProgress(Console(file=io.StringIO(), force_terminal=True))
    assert progress.live is None


@pytest.mark.parametrize(
    ("seconds", "exact", "shown"),
    [
        (0.9, True, "0 s"),
        (59.9, False, "59 s"),
        (61, True, "1 min 01 s"),
        (91, False, "2 min"),
        (3599.99, False, "1 h 00 min"),
        (3599, True, "59 min"),
        (3900, True, "1 h 05 min"),
        (86399, True, "23 h 59 min"),
        (86400 * 2 + 3 * 3600 + 59, True, "2 d 03 h"),
    ],
)
def test_durations_read_as_a_person_says_them(seconds, exact, shown):
    assert show_seconds(seconds, exact) == shown


# In a real terminal: a gauge that fails at first, a line of a library, a failure, a log; then what is left.
IN_TERMINAL = """
import sys, time
from pathlib import Path
from rich.console import Console
import raylab.runs.progress

raylab.runs.progress.GAUGE_SECONDS = 0.2

progress = raylab.runs.progress.SweepProgress(Console(stderr=True, soft_wrap=True), "spans")
progress.log_to(Path(sys.argv[1]))
calls = []
def gauge():
    calls.append(1)
    if len(calls) == 1:
        raise RuntimeError("no cluster")
    return [("GPU", 3, 4)]
progress.gauge, progress.planned = gauge, 100
for number in range(100):
    trial = f"arm{number}-0"
    progress.start_trial(trial)
    status = "failed" if number == 50 else "complete"
    progress.finish_trial({"trial_id": trial, "arm": f"arm{number}", "status": status, "error": "Error: " + "x " * 60},
                          number / 1000, 1.0, 100)
    if number == 60:
        print("from a library", file=sys.stderr)
    time.sleep(0.02)
progress.stop()
print("ranking")
"""


def read_terminal(tmp_path, width, **variables):
    """What a child wrote to a pseudo-terminal."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    hidden = ("CI", "NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(IN_TERMINAL), str(tmp_path / "sweep.log")],
        stdin=inner, stdout=inner, stderr=inner, env=environment | {"TERM": "xterm-256color"} | variables,
    )  # fmt: skip
    os.close(inner)
    written = b""
    while True:
        try:
            part = os.read(outer, 65536)
        except OSError:
            break
        if not part:
            break
        written += part
    os.close(outer)
    assert child.wait() == 0
    return written.decode()


def test_live_block_in_a_terminal(tmp_path):
    written = read_terminal(tmp_path, 60)
    for part in ("spans", "from a library", "trial arm50-0 failed: Error:", "GPU 3/4", "trials/h", "\x1b[?25l"):
        assert part in written
    # Drawn about twice a second, not once a trial; the cursor is back and the block gone at the end.
    assert written.count("\x1b[2K") < 1000
    assert "arm5-0" not in written
    last = written[written.rindex("\x1b[2K") :]
    assert "\x1b[?25h" in written[written.rindex("\x1b[?25l") :]
    assert "spans: 99 complete, 1 failed" in last
    assert last.rstrip().endswith("ranking")
    logged = (tmp_path / "sweep.log").read_text()
    assert ESCAPE not in logged
    assert "100/100 arm99-0 complete" in logged
    assert logged.count("trial arm50-0 failed") == 1


@pytest.mark.parametrize("variables", [{"CI": "true"}, {"TERM": "dumb"}])
def test_a_terminal_that_nobody_watches_gets_plain_lines(tmp_path, variables):
    written = read_terminal(tmp_path, 80, **variables)
    assert "\x1b[?25l" not in written
    assert "\x1b[2K" not in written
    assert "100/100 arm99-0 complete" in written
