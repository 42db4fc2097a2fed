"""Find the fastest of several implementations for a shape: timed once per GPU and cached on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

Write = Callable[[Path], AbstractContextManager[Any]]
"""write(path): context manager of a binary file that replaces `path` atomically at the end of the block."""


class Tile(NamedTuple):
    """Tile size and launch settings of a kernel."""

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 64
    """Tile size along the inner axis of a matrix product, if the kernel splits this axis."""

    def __str__(self) -> str:
        """Return the name of the tile in tables."""
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages"


def bucket(size: int) -> int:
    """Round a length up to a power of two, so that similar lengths share one timing."""
    return int(triton.next_power_of_2(size))


@dataclass(frozen=True)
class Timing:
    """The timings of one shape: the name of the fastest implementation, and the time of each."""

    fastest: str
    milliseconds: dict[str, float]


class Tuner:
    """Times several implementations once per key and caches the timings in a JSON file.

    An unreadable file is treated as empty. Errors while writing the file are ignored.
    """

    def __init__(
        self, file: Path, write: Write, measure: Callable[[Callable[[], Any]], float] | None = None, gpu: str = ""
    ) -> None:
        """measure: returns the time of a call in ms; None is `milliseconds`. gpu: name; empty is the current GPU's."""
        self.file, self.write, self.measure, self.gpu = file, write, measure or milliseconds, gpu
        self.known = self._read()

    def fastest(self, key: str, ways: Mapping[str, Callable[[], Any]]) -> Timing:
        """Return the timing of a key; runs `ways` only if the key is new or its fastest one is not in `ways`."""
        known = self.find(key, ways)
        if known is None:
            times = {name: self.measure(way) for name, way in ways.items()}
            known = self.known[self._full(key)] = Timing(min(times, key=lambda name: times[name]), times)
            self._save()
        return known

    def find(self, key: str, ways: Mapping[str, Callable[[], Any]]) -> Timing | None:
        """Return the cached timing of a key; None if it is new or its fastest implementation is not in `ways`."""
        known = self.known.get(self._full(key))
        return known if known is not None and known.fastest in ways else None

    def _full(self, key: str) -> str:
        gpu = self.gpu or torch.cuda.get_device_name()
        return f"{gpu}, torch {torch.__version__}, triton {triton.__version__}: {key}"

    def _read(self) -> dict[str, Timing]:
        try:
            table = json.loads(self.file.read_text())
            return {key: Timing(str(row["fastest"]), dict(row["milliseconds"])) for key, row in table.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _save(self) -> None:
        merged = {**self._read(), **self.known}  # another process may have written the file
        rows = {key: {"fastest": t.fastest, "milliseconds": t.milliseconds} for key, t in sorted(merged.items())}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.write(self.file) as handle:
                handle.write(json.dumps(rows, indent=1).encode())
        except Exception:  # the timing is valid without the cache
            return


def milliseconds(way: Callable[[], Any]) -> float:
    """Return the median time of a call on the GPU; infinite if this GPU cannot run the call.

    A CUDA graph of the call is replayed, so that the time of Python is not part of it.
    """
    try:
        return float(triton.testing.do_bench_cudagraph(way, rep=20, return_mode="median"))
    except (triton.runtime.errors.OutOfResources, torch.OutOfMemoryError):
        return float("inf")
