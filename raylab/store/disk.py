"""The disk that a job takes, as its driver noted it last: `status` walks no folders."""

import json
from pathlib import Path
from typing import Any

from raylab.store.storage import read

NOTE = ".disk.json"


def read_disk(results: Path, job: str) -> dict[str, Any]:
    """What a driver noted last; empty where none did."""
    try:
        found: dict[str, Any] = json.loads(read(results, results / job / NOTE))
    except (OSError, ValueError):
        return {}
    return found
