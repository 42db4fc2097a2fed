"""The input image and the result side by side in one image."""

from __future__ import annotations

import numpy as np

from pfstorer_rt.imaging.bands import Resized
from pfstorer_rt.imaging.rows import Band, Rows

GAP = 8
"""White pixels between the two images."""


class SideBySide:
    """Two images side by side, by rows; the left one is resized to the size of the right one."""

    def __init__(self, left: Rows, right: Rows) -> None:
        self.right, self.height = right, right.height
        self.left = Resized(left, right.height, right.width, antialias=right.height < left.height)
        self.width = 2 * right.width + GAP

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, (3, n, W)."""
        gap = np.ones((3, stop - start, GAP), np.float32)
        return np.concatenate([self.left.read(start, stop), gap, self.right.read(start, stop)], 2)
