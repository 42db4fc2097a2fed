"""How far a long operation is: reported by library functions to a callback, drawn by the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageProgress:
    """State of one stage of a longer operation."""

    stage: str
    """Name of the stage, such as `restorer` or `photographs`."""
    done: int
    """Iterations or samples that are finished, earlier runs included."""
    total: int | None
    """None where the stage ends after a time instead."""
    loss: float = math.nan
    """Loss of the last iteration; NaN where the stage has none."""
    seconds: float = 0.0
    """Time since this run started the stage."""
    time_share: float = 0.0
    """Finished share of a stage that ends after a time."""

    @property
    def share(self) -> float:
        """Finished share of the stage, 1 at its end."""
        return self.done / self.total if self.total else self.time_share


class CancelledError(Exception):
    """Raise this in a progress callback to end the operation.

    Finished results are kept. A training writes its checkpoint first, so that the same call resumes it.
    """


OnProgress = Callable[[StageProgress], None]
"""Called when a stage starts, with what earlier runs finished, and after every iteration or chunk."""


def ignore_progress(_: StageProgress) -> None:
    """Do nothing: the default of every `on_progress`."""
