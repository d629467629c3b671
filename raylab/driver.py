"""Who drives a job: one process at a time, known by a token; and the request that it stop."""

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from raylab.mistakes import JobError

# "rung": trials end at their next rung; "now": at once.
Stop = Literal["rung", "now"]


def _write(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content))
    os.replace(scratch, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def claim_job(results: Path, name: str) -> Iterator[str]:
    """Makes this process the job's only driver until the block ends, and gives its token.

    The lock goes with the process, however it ends. The token is what trials look at before they write: one that
    outlives its driver is told by it that another one goes on. Raises JobError where a driver is alive.
    """
    folder = results / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".driver.lock")
        lock.acquire(timeout=0)
        token = secrets.token_hex(8)
        (folder / ".stop").unlink(missing_ok=True)
        _write(folder / ".driver", {"token": token, "pid": os.getpid(), "host": socket.gethostname()})
    except Timeout:
        holder = _read(folder / ".driver")
        who = f"process {holder['pid']} on {holder['host']}" if holder.get("token") else "another process"
        raise JobError([f"job {name} is being run by {who}; wait for it, or: raylab stop {name}"]) from None
    except OSError as error:
        raise JobError([f"--results {results}: {error.strerror}; choose a folder that can be written"]) from None
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):
            _write(folder / ".driver", {"token": None})
        lock.release()


def read_token(results: Path, name: str) -> str | None:
    """The token of the job's driver; None where none runs, as far as it is known."""
    token: str | None = _read(results / name / ".driver").get("token")
    return token


def is_driven(results: Path, name: str) -> bool:
    """Whether a driver of the job is alive; one on another machine is believed to be."""
    holder = _read(results / name / ".driver")
    if not holder.get("token"):
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except PermissionError:  # another user's
        return True
    except (OSError, KeyError, ValueError):
        return False
    return True


def request_stop(results: Path, name: str, now: bool) -> None:
    """Asks the job's driver to stop. Raises JobError where none runs."""
    if not is_driven(results, name):
        raise JobError([f"job {name} is not running; 'raylab resume {name}' goes on with it"])
    _write(results / name / ".stop", {"when": "now" if now else "rung"})


def read_stop(results: Path, name: str) -> Stop | None:
    """What was asked of the job's driver and trials since it started, if anything."""
    when: Stop | None = _read(results / name / ".stop").get("when")
    return when
