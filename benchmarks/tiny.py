"""What the benchmarks of sweeps share: synthetic notes, a tiny job on them, and raylab as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylab.data.synth import write_notes
from raylab.job.jobs import check_job, dump_yaml, merge
from raylab.job.specs import Job

TASKS = ("condition", "severity", "outcome")


def write_tiny_notes(folder: Path, num_notes: int = 200) -> Path:
    """Writes short synthetic notes and returns their file."""
    write_notes(folder, num_notes=num_notes, seed=0, max_words=80)
    return folder / "notes.parquet"


def make_job(notes: Path, changes: Mapping[str, Any]) -> Job:
    """A job of an encoder of two narrow layers, with dotted settings changed."""
    table = {"path": str(notes), "text": "text", "group": "patient"}
    raw: dict[str, Any] = {
        "name": "tiny",
        "corpus": {
            "documents": table,
            "tasks": {task: {**table, "label": task} for task in TASKS},
            "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
            "max_length": 64,
        },
        "encoder": {
            "config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
            "tokenizer": {"vocab_size": 400},
        },
        "pretrain": {"num_tokens": 12_000, "rungs": 3, "batch_tokens": 1024, "learning_rate": 1e-3},
        "evaluate": {
            "tasks": ["severity"],
            "shots": [2],
            "draws": 2,
            "probes": ["logistic"],
            "geometry": {"max_points": 100, "graph_points": 50},
            "retrieval": {"span": 16, "candidates": 8},
        },
    }
    for name, value in changes.items():
        block = value
        for part in reversed(name.split(".")):
            block = {part: block}
        raw = merge(raw, block)
    return check_job(raw)


def start_raylab(*arguments: str, scratch: Path, **options: Any) -> subprocess.Popen[Any]:
    """A raylab command as a process; Ray's files go under `scratch`, whose path must be short for Ray's sockets."""
    scratch.mkdir(exist_ok=True)
    environment = {**os.environ, "RAY_TMPDIR": str(scratch), "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "raylab.cli", *arguments], env=environment, **options)


def write_job(job: Job, path: Path) -> Path:
    """Writes a job file."""
    path.write_text(dump_yaml(job))
    return path
