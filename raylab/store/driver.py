"""Who drives a job: one process at a time, known by a token; and the request that it stop."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from raylab.base.mistakes import JobError
from raylab.store.storage import LOG, is_mirror, push, read, remove, write

# "rung": trials end at their next rung; "now": at once.
Stop = Literal["rung", "now"]

# At a URL, where nothing can be locked: how long a driver's count may stand still before another one takes over; its
# driver raises it, and puts the log there, BEATS times meanwhile.
LEASE_SECONDS = 30.0
BEATS = 6

# Tokens of this process that another driver has taken over from.
_lost: set[str] = set()


def _write(results: Path, name: str, file: str, content: dict[str, Any]) -> None:
    write(results, results / name / file, json.dumps(content).encode())


def _read(results: Path, name: str, file: str) -> dict[str, Any]:
    try:
        found = json.loads(read(results, results / name / file))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def claim_job(
    results: Path, name: str, lease: float | None = None, tell: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """Makes this process the job's only driver until the block ends, and gives its token.

    In a folder a file lock goes with the process, however it ends; at a URL a driver is dead once its count has stood
    still for `lease` seconds (LEASE_SECONDS). The token is what trials look at before they write: one that outlives its
    driver is told by it that another one goes on. Raises JobError where a driver is alive.
    """
    token, lease = secrets.token_hex(8), lease or LEASE_SECONDS
    with contextlib.ExitStack() as held:
        try:
            (results / name).mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(results / name / ".driver.lock").acquire(timeout=0))
            if is_mirror(results):
                _watch_driver(results, name, lease, tell)
            remove(results, results / name / ".stop")
            _write(results, name, ".driver", _describe(token, 0))
            if is_mirror(results):
                # Of two that found no driver at once, the one that wrote last goes on.
                time.sleep(lease / 30)
                if read_token(results, name) != token:
                    raise Timeout(str(results))
        except Timeout:
            holder = _read(results, name, ".driver")
            who = f"process {holder['pid']} on {holder['host']}" if holder.get("token") else "another process"
            raise JobError([f"job {name} is being run by {who}; wait for it, or: raylab stop {name}"]) from None
        except OSError as error:
            where = error.strerror if is_mirror(results) else f"{results}: {error.strerror}"
            raise JobError([f"--results {where}; choose a folder that can be written"]) from None
        try:
            with _beating(results, name, token, lease):
                yield token
        finally:
            with contextlib.suppress(OSError):
                if not is_mirror(results) or read_token(results, name) == token:
                    _write(results, name, ".driver", {"token": None})


def _describe(token: str, count: int) -> dict[str, Any]:
    return {"token": token, "pid": os.getpid(), "host": socket.gethostname(), "count": count}


def _watch_driver(results: Path, name: str, lease: float, tell: Callable[[str], None]) -> None:
    """Waits until a driver that wrote its name is seen to be dead; clocks are not compared. Raises Timeout."""
    seen, since = _read(results, name, ".driver"), time.monotonic()
    if seen.get("token"):
        tell(f"process {seen['pid']} on {seen['host']} was running {name}: {lease:g} s to see whether it still does")
    while seen.get("token") and time.monotonic() - since < lease:
        time.sleep(lease / 30)
        found = _read(results, name, ".driver")
        if found.get("token") and found != seen:
            raise Timeout(str(results))
        seen = found


@contextlib.contextmanager
def _beating(results: Path, name: str, token: str, lease: float) -> Iterator[None]:
    """At a URL, raises the driver's count and puts its log there until the block ends, whatever else it does."""
    if not is_mirror(results):
        yield
        return
    ended, log, pushed = threading.Event(), results / name / LOG, -1

    def beat() -> None:
        nonlocal pushed
        count = 0
        while not ended.wait(lease / BEATS):
            # What can't be reached may be reached next time.
            with contextlib.suppress(OSError):
                if read_token(results, name) != token:
                    _lost.add(token)
                    return
                count += 1
                _write(results, name, ".driver", _describe(token, count))
                size = log.stat().st_size
                if size != pushed:
                    push(results, log)
                    pushed = size

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if token not in _lost:
            with contextlib.suppress(OSError):
                push(results, log)


def has_lost(token: str) -> bool:
    """Whether another driver has taken over from this process, which it found dead: nothing may be written any more."""
    return token in _lost


def read_token(results: Path, name: str) -> str | None:
    """The token of the job's driver; None where none runs, as far as it is known."""
    token: str | None = _read(results, name, ".driver").get("token")
    return token


def is_driven(results: Path, name: str) -> bool:
    """Whether a driver of the job is alive; one on another machine is believed to be."""
    holder = _read(results, name, ".driver")
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
    _write(results, name, ".stop", {"when": "now" if now else "rung"})


def read_stop(results: Path, name: str) -> Stop | None:
    """What was asked of the job's driver and trials since it started, if anything can be known of it now."""
    try:
        when: Stop | None = _read(results, name, ".stop").get("when")
    except OSError:
        return None
    return when
