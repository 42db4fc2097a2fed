"""Input and result in one picture."""

from __future__ import annotations

import numpy as np

from pfstorer_rt.imaging.bands import Canvas, Result, Unit
from pfstorer_rt.imaging.rows import Pixels, Rows

GAP = 8
"""White pixels between the two."""


class SideBySide:
    """Two pictures side by side, by rows; the left one is brought to the size of the right."""

    def __init__(self, left: Rows, right: Rows) -> None:
        self.right, self.height = right, right.height
        canvas = Canvas(left.height, left.width, 0, 0, right.height, right.width)
        self.left = Result(Unit(left), canvas, lambda: "not finite")
        self.width = 2 * right.width + GAP

    def read(self, start: int, stop: int) -> Pixels:
        """Return rows start..stop-1, (n, W, 3)."""
        gap = np.ones((stop - start, GAP, 3), np.float32)
        return np.concatenate([self.left.read(start, stop), gap, self.right.read(start, stop)], 1)
