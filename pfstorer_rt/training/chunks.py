"""Arrays of samples that worker processes make once, in chunks, and that can stay on the disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfstorer_rt.files import atomic_write, check_space
from pfstorer_rt.progress import OnProgress, StageProgress, ignore_progress
from pfstorer_rt.training.data import Batch, prefetch

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Samples:
    """Samples that are made once."""

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


def make_arrays(samples: Samples, work: Path | None, on_progress: OnProgress = ignore_progress) -> Arrays:
    """Return arrays (count, *shape): memory maps `work/NAME.npy`, made now or by an earlier call.

    An interrupted call is resumed after its last whole chunk. work: None keeps the arrays in memory. Raises
    `PFStorerError` if the disk has too little space.
    """
    count, size, started = samples.count, samples.chunk, time.monotonic()
    done, arrays = (0, empty_arrays(samples)) if work is None else open_arrays(samples, work)
    on_progress(StageProgress(samples.title, done, count))
    for chunk in prefetch(samples.make, done // size, -(-count // size), samples.workers):
        length = min(size, count - done)
        for name, values in samples.finish(chunk).items():
            arrays[name][done : done + length] = values[:length]
        done += length
        if work is not None:
            record(samples, arrays, work, done)
        on_progress(StageProgress(samples.title, done, count, seconds=time.monotonic() - started))
    return arrays


def empty_arrays(samples: Samples) -> Arrays:
    """Return arrays in memory."""
    return {name: np.empty((samples.count, *shape), kind) for name, (kind, shape) in samples.arrays.items()}


def open_arrays(samples: Samples, work: Path) -> tuple[int, Arrays]:
    """Return the number of samples that an earlier call with the same mark has written, and the memory maps."""
    done = finished_samples(samples, work)
    if not done:
        sizes = (np.dtype(kind).itemsize * math.prod(shape) for kind, shape in samples.arrays.values())
        check_space(work, samples.count * sum(sizes))  # writing to a map of a full disk would end the process
    return done, {
        name: np.lib.format.open_memmap(work / f"{name}.npy", "r+" if done else "w+", kind, (samples.count, *shape))
        for name, (kind, shape) in samples.arrays.items()
    }


def record(samples: Samples, arrays: Arrays, work: Path, done: int) -> None:
    """Write the arrays to the disk, then the number of finished samples."""
    for array in arrays.values():
        assert isinstance(array, np.memmap)
        array.flush()
    with atomic_write(work / f"{samples.title}.json") as file:
        file.write(json.dumps({"done": done, "signature": samples.mark}).encode())


def finished_samples(samples: Samples, work: Path) -> int:
    """Return how many samples an earlier call with the same mark has written; 0 if one of its files is damaged."""
    try:
        found = json.loads((work / f"{samples.title}.json").read_text())
        done = int(found["done"]) if found["signature"] == samples.mark else 0
        arrays = {name: np.load(work / f"{name}.npy", mmap_mode="r") for name in samples.arrays if done}
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return 0
    whole = all(arrays[name].shape == (samples.count, *shape) for name, (_, shape) in samples.arrays.items() if done)
    return done if whole and 0 <= done <= samples.count else 0
