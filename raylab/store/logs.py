"""The file with what a job's driver has said."""

import contextlib
import os
from pathlib import Path

from raylab.store.storage import LOG, fetch_files, is_mirror


def open_log(results: Path, job: str, *, own: bool = False) -> Path:
    """The file with what a job's driver has said. Of a URL it is a copy; the driver's `own` goes on in its mirror."""
    path = results / job / LOG
    if not is_mirror(results):
        return path
    copy = path.with_name(f".{LOG}")
    with contextlib.suppress(FileNotFoundError):
        fetch_files(results, {path: copy})
        # Killed before its last lines were put there, a driver has more of it than the URL.
        if own and (not path.exists() or path.stat().st_size < copy.stat().st_size):
            os.replace(copy, path)
    return path if own else copy
