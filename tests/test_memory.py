"""Peak memory of a stretch of work, on the CPU."""

import numpy as np
import torch

from raylab.base.memory import read_peak, reset_peak

CPU = torch.device("cpu")
MEGABYTES = 300


def test_a_peak_is_that_of_the_work_since_the_reset():
    reset_peak(CPU)
    before = read_peak(CPU)
    taken = np.ones(MEGABYTES * 2**20 // 8)
    high = read_peak(CPU)
    assert (high - before) / 2**20 > MEGABYTES / 2  # a system short of memory may take some of it away
    del taken
    assert read_peak(CPU) > high - 2**20  # freed: it was a peak none the less (the system counts in some pages at once)
    reset_peak(CPU)
    assert (high - read_peak(CPU)) / 2**20 > MEGABYTES / 2
