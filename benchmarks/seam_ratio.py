"""How visible the borders of tiles are in an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pfstorer_rt.tiling import Tile


def seam_ratio(image: npt.NDArray[Any], tiles: Sequence[Tile], grid: int = 1) -> float:
    """Return the mean gradient across tile borders divided by the mean gradient at other multiples of `grid` pixels.

    image: (H, W, C). tiles: in pixels of the image. grid: pixels per latent pixel, because decoded images have a
    faint grid of this period. The ratio is about 1 without visible seams, 1 for a constant image, and infinite for an
    image that is constant except for its seams.
    """
    at, expected = 0.0, 0.0
    for axis, length in enumerate(image.shape[:2]):
        gradient = np.abs(np.diff(image.astype(np.float64), axis=axis)).mean((1 - axis, 2))
        borders: set[int] = {t[axis] for t in tiles} | {t[axis] + t[axis + 2] for t in tiles}
        places = [b - 1 for b in sorted(borders) if 0 < b < length]
        others = [p - 1 for p in range(grid, length, grid) if p not in borders]
        at += float(gradient[places].sum())
        # Per axis: the image may be rougher along one axis, and the axes have different numbers of borders.
        expected += len(places) * float(gradient[others].mean() if others else 0)
    if at == expected == 0:
        return 1.0
    return at / expected if expected else float("inf")
