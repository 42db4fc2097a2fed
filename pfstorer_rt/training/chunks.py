"""Arrays of samples that worker processes make once, in chunks, and that stay on the disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfstorer_rt.progress import OnProgress, StageProgress, ignore_progress
from pfstorer_rt.training.data import Batch, prefetch

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Samples:
    """Samples that are made once and kept as memory maps."""

    title: str
    """Name of the stage, and of the file `TITLE.json` that counts finished samples."""
    arrays: Mapping[str, tuple[type, tuple[int, ...]]]
    """Name of an array -> type and shape of one sample."""
    count: int
    chunk: int
    """Samples that are made and written at once."""
    mark: str
    """Identifies settings and data: files with the same mark are used or resumed, others are replaced."""
    make: Callable[[int], Batch]
    """Chunk number -> raw samples; runs in `workers` processes."""
    finish: Callable[[Batch], Mapping[str, npt.NDArray[Any]]]
    """Raw samples -> an array for each name; runs in the calling process."""
    workers: int = 0


def make_arrays(samples: Samples, work: Path, on_progress: OnProgress = ignore_progress) -> Arrays:
    """Return memory maps `work/NAME.npy` of (count, *shape), made now or by an earlier call.

    An interrupted call is resumed after its last whole chunk.
    """
    counter, count, size = work / f"{samples.title}.json", samples.count, samples.chunk
    done, started = finished_samples(samples, work, counter), time.monotonic()
    arrays: Arrays = {
        name: np.lib.format.open_memmap(work / f"{name}.npy", "r+" if done else "w+", kind, (count, *shape))
        for name, (kind, shape) in samples.arrays.items()
    }
    on_progress(StageProgress(samples.title, done, count))
    for chunk in prefetch(samples.make, done // size, -(-count // size), samples.workers):
        length = min(size, count - done)
        for name, values in samples.finish(chunk).items():
            arrays[name][done : done + length] = values[:length]
            arrays[name].flush()  # type: ignore[attr-defined]
        done += length
        counter.write_text(json.dumps({"done": done, "signature": samples.mark}))
        on_progress(StageProgress(samples.title, done, count, seconds=time.monotonic() - started))
    return arrays


def finished_samples(samples: Samples, work: Path, counter: Path) -> int:
    """Return how many samples an earlier call with the same mark has written."""
    if not counter.exists() or not all((work / f"{name}.npy").exists() for name in samples.arrays):
        return 0
    found = json.loads(counter.read_text())
    return int(found["done"]) if found["signature"] == samples.mark else 0
