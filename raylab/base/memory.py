"""Peak memory of a stretch of work: of the process on a CPU, of torch's allocations on a GPU."""

import contextlib
import ctypes
import resource
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """A process does many things one after another: each one's peak is its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    # What was freed but not given back would count for what comes next; other systems have no such call.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: torch.device) -> int:
    """Bytes since the last `reset_peak` (of a CPU off Linux: ever)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
