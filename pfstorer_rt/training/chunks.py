"""Arrays of samples that are made once, in chunks, by other processes, and kept on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from pfstorer_rt.console import stderr
from pfstorer_rt.training.data import Batch, prefetch

Arrays = dict[str, npt.NDArray[Any]]


def make_arrays(
    work: Path,
    title: str,
    items: Mapping[str, tuple[type, tuple[int, ...]]],
    count: int,
    size: int,
    mark: str,
    make: Callable[[int], Batch],
    workers: int,
    finish: Callable[[Batch], Mapping[str, npt.NDArray[Any]]],
) -> Arrays:
    """Return memory maps `work/NAME.npy` of (count, *shape), filled `size` samples at a time.

    items: name -> type and shape of one sample. make: chunk number -> the raw samples, in `workers` processes.
    finish: those -> an array for each name, in this process. mark: arrays of the same one are taken up, or gone on
    with after an interruption; others are made anew.
    """
    progress_file, done = work / f"{title}.json", 0
    if progress_file.exists() and all((work / f"{name}.npy").exists() for name in items):
        progress = json.loads(progress_file.read_text())
        done = progress["done"] if progress["signature"] == mark else 0
    arrays: Arrays = {
        name: np.lib.format.open_memmap(work / f"{name}.npy", "r+" if done else "w+", kind, (count, *shape))
        for name, (kind, shape) in items.items()
    }
    chunks = prefetch(make, done // size, -(-count // size), workers)
    for chunk in track(chunks, title, console=stderr()):
        length = min(size, count - done)
        for name, values in finish(chunk).items():
            arrays[name][done : done + length] = values[:length]
            arrays[name].flush()  # type: ignore[attr-defined]
        done += length
        progress_file.write_text(json.dumps({"done": done, "signature": mark}))
    return arrays
