"""Peak memory of a stretch of work: of the process on a CPU, on a GPU what torch holds of it."""

import contextlib
import ctypes
import os
import resource
from pathlib import Path

import torch

# The highest peak of the laps before the one that runs, by kind of device.
_before: dict[str, int] = {}


# What CUDA itself takes of a GPU for each process, beside what torch allocates: contexts, libraries, kernels.
CONTEXT_BYTES = 2**30


def share_memory(share: float) -> None:
    """Keeps torch in this process to a share of its GPU's memory, so that trials beside it keep theirs.

    A share of 0 hides the GPUs, if none was used yet: whether Ray hides them differs between its versions.
    """
    if share == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif share < 1 and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cut_share(share, total))


def cut_share(share: float, total: int) -> float:
    """The share of `total` bytes that is left to torch, once CUDA has taken its own from that of the process."""
    return max(share - CONTEXT_BYTES / total, share / 2)


def reset_peak(device: torch.device) -> None:
    """A process does many things one after another: each one's peak is its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        # What was freed but not given back would count for what comes next; other systems have no such call.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    _before[device.type] = 0
    _reset(device)


def start_lap(device: torch.device, *, counted: bool = True) -> None:
    """Begins a lap, whose peak `read_lap` tells. Not `counted`: `read_peak` forgets the lap that ends here."""
    _before[device.type] = max(_before.get(device.type, 0), read_lap(device) if counted else 0)
    _reset(device)


def read_peak(device: torch.device) -> int:
    """Bytes since the last `reset_peak` (of a CPU off Linux: ever)."""
    return max(_before.get(device.type, 0), read_lap(device))


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_lap(device: torch.device) -> int:
    """Bytes since the last `start_lap` or `reset_peak`."""
    if device.type == "cuda":
        # Not what is allocated: what a CUDA graph writes to when it is replayed counts there only while it is recorded.
        return int(torch.cuda.max_memory_reserved(device))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
