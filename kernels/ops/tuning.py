"""Which of several ways is the fastest for a shape: timed once on this GPU, remembered on disk."""

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
"""write(path): a binary file that replaces the one at `path` as a whole when its block is left."""


class Tile(NamedTuple):
    """How a kernel divides its work."""

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 64
    """Of a matrix product's inner axis, where that is cut too."""

    def __str__(self) -> str:
        """Name the tile in tables."""
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages"


def bucket(size: int) -> int:
    """Round a length up to a power of two, so that lengths alike share one timing."""
    return int(triton.next_power_of_2(size))


@dataclass(frozen=True)
class Timing:
    """What was found for one shape."""

    fastest: str
    milliseconds: dict[str, float]


class Tuner:
    """Times the ways to compute something, once for each key, and keeps what it found in a JSON file.

    The file is a cache: one that cannot be read counts as empty, one that cannot be written is not missed.
    """

    def __init__(self, file: Path, write: Write) -> None:
        self.file, self.write = file, write
        self.known = self._read()

    def fastest(self, key: str, ways: Mapping[str, Callable[[], Any]]) -> Timing:
        """Return the timing of a key; `ways` are run only when it is new or names another set of ways."""
        full = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: {key}"
        known = self.known.get(full)
        if known is None or known.fastest not in ways:
            times = {name: milliseconds(way) for name, way in ways.items()}
            known = self.known[full] = Timing(min(times, key=lambda name: times[name]), times)
            self._save()
        return known

    def _read(self) -> dict[str, Timing]:
        try:
            table = json.loads(self.file.read_text())
            return {key: Timing(str(row["fastest"]), dict(row["milliseconds"])) for key, row in table.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _save(self) -> None:
        merged = {**self._read(), **self.known}  # another process may have written meanwhile
        rows = {key: {"fastest": t.fastest, "milliseconds": t.milliseconds} for key, t in sorted(merged.items())}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.write(self.file) as handle:
                handle.write(json.dumps(rows, indent=1).encode())
        except Exception:  # whatever the disk says: the timing itself is known
            return


def milliseconds(way: Callable[[], Any]) -> float:
    """Return the median time of a call on the GPU; infinite for one that this GPU cannot run."""
    try:
        return float(triton.testing.do_bench(way, warmup=10, rep=40, return_mode="median"))
    except (triton.runtime.errors.OutOfResources, torch.OutOfMemoryError):
        return float("inf")
