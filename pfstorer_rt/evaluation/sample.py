"""An image to be measured, and the type of measuring functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from pfstorer_rt.imaging.rows import Pixels

T = TypeVar("T")


class Sample:
    """An image with cached results, so that several metrics share one face detection.

    pixels: (H, W, 3) float32 in [0, 1].
    """

    def __init__(self, pixels: Pixels) -> None:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype.kind != "f":
            raise ValueError(f"pixels {pixels.shape} {pixels.dtype}; expected (H, W, 3) float in [0, 1]")
        if not pixels.size or not np.isfinite(pixels).all():
            raise ValueError(f"pixels {pixels.shape} that are empty, NaN or infinite; expected numbers in [0, 1]")
        self.pixels = pixels
        self._known: dict[Hashable, object] = {}

    def once(self, function: Callable[[Pixels], T]) -> T:
        """Return `function(pixels)`, computed at the first call."""
        if function not in self._known:
            self._known[function] = function(self.pixels)
        return self._known[function]  # type: ignore[return-value]


Measure = Callable[[Sample, Sample, Sequence[Sample]], "float | None"]
"""measure(result, original, references) -> value, or None if the metric is not defined for these images."""
