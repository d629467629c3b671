"""What ends a request or a trial, and how an error is told without the texts that its message could quote."""

import traceback
from pathlib import Path


class JobError(ValueError):
    """A request that can't be run; `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Interrupted(Exception):  # noqa: N818 - a user's wish, not an error
    """Ctrl-C: what is recorded stays, resume goes on."""


class InfeasibleError(ValueError):
    """An arm that cannot work on this corpus, such as spans that no document is long enough for."""


def describe_error(error: BaseException, more: str = "--debug shows more") -> str:
    """The kind of an error and where it happened, without its message: that could quote a text."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "raylab" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}; {more}"
