"""The disk that a job takes, as its driver noted it last: `status` walks no folders."""

import json
from pathlib import Path
from typing import Any

NOTE = ".disk.json"


def read_disk(results: Path, job: str) -> dict[str, Any]:
    """What a driver noted last; empty where none did."""
    try:
        found: dict[str, Any] = json.loads((results / job / NOTE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found
