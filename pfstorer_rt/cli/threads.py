"""The number of PyTorch's threads beside other programs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

LONG = 0.5
"""Shortest measurement in seconds; processor times are counted in steps of 0.01 s."""


class Usage(NamedTuple):
    """Seconds since some start."""

    wall: float
    cores: float
    """Processor time of all cores, of all programs."""
    own: float
    """Processor time of this process."""

    @classmethod
    def now(cls) -> Usage:
        """Read the counters of the system."""
        import psutil

        times, own = psutil.cpu_times(), os.times()
        # Linux counts the time of guests as user time too.
        idle = ("idle", "iowait", "guest", "guest_nice")
        cores = sum(value for name, value in times._asdict().items() if name not in idle)
        return cls(time.monotonic(), cores, own.user + own.system)


@contextmanager
def free_cores_only() -> Iterator[None]:
    """Measure the load of other programs inside the block, then give PyTorch only as many threads as cores are free.

    A thread on a core of another program is late at the end of every operation, and all others wait for it
    (benchmarks/busy.py). OMP_NUM_THREADS, which sets the number of threads, disables this, and so does a block that
    ends within `LONG` seconds.
    """
    before = Usage.now()
    yield
    after = Usage.now()
    if "OMP_NUM_THREADS" not in os.environ and after.wall - before.wall >= LONG:
        import torch

        torch.set_num_threads(threads(torch.get_num_threads(), os.cpu_count() or 1, before, after))


def threads(most: int, cores: int, before: Usage, after: Usage) -> int:
    """Return the number of cores that other programs left free between two measurements, at least 1, at most `most`."""
    others = ((after.cores - before.cores) - (after.own - before.own)) / (after.wall - before.wall)
    return max(1, min(most, round(cores - others)))
