"""What ends a request or a trial, and how an error is told without the texts that its message could quote."""

import errno
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

# What the place of the results can run into; no fault of a trial, which goes on once it is mended.
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM}


class JobError(ValueError):
    """A request that can't be run; `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or the end of the cluster: what is recorded stays, resume goes on."""


class InfeasibleError(ValueError):
    """An arm that cannot work on this corpus, such as spans that no document is long enough for."""


class DamagedError(RuntimeError):
    """A file of a table that can't be read as it was written."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is damaged; 'raylab resume {path.parts[-3]}' writes it again")
        self.path = path


class RemoteError(OSError):
    """What the file system of results at a URL refused; its `strerror` is one line, without any content."""


class BusyError(RuntimeError):
    """A stage is being built by another process."""


class SupersededError(RuntimeError):
    """Another process drives the job by now: this one must not write."""


def describe_error(error: BaseException, more: str = "--debug shows more") -> str:
    """The kind of an error and where it happened, without its message: that could quote a text."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "raylab" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}; {more}"


def find_storage_problem(error: BaseException) -> str | None:
    """Why files can't be written or read (full, read-only, failing), if that is what an error comes from."""
    for cause in list_causes(error):
        if isinstance(cause, RemoteError):
            return str(cause.strerror)
        number = cause.errno if isinstance(cause, OSError) else None
        # safetensors and NumPy say it in words only.
        if type(cause).__name__ == "SafetensorError" and (told := re.search(r"\(os error ([0-9]+)\)", str(cause))):
            number = int(told[1])
        if isinstance(cause, OSError) and number is None and re.search(r"requested and [0-9]+ written", str(cause)):
            number = errno.ENOSPC
        if number in STORAGE:
            return os.strerror(number)
    return None


def list_causes(error: BaseException | None, depth: int = 8) -> Iterator[BaseException]:
    """An error, what it came from, and what Ray Train's workers met."""
    if error is None or depth == 0:
        return
    yield error
    yield from list_causes(error.__cause__ or error.__context__, depth - 1)
    for failure in getattr(error, "worker_failures", {}).values():
        yield from list_causes(failure, depth - 1)
