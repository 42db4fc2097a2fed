"""What the networks see of an image: full contrast, skin tones in an image without colours, and a weaker tint.

The bases are trained on photographs with black, white and usual colours. The result gets the contrast and the hue of
the image again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pfstorer_rt.imaging.balance import balancing_factors
from pfstorer_rt.imaging.rows import Band, Rows, bands
from pfstorer_rt.imaging.tone import Shown, in_skin_tones, reduced, unchanged

FLAT = 0.55
"""An image whose values span less than this share of black to white gets full contrast. The luma of 350 photographs and
their heavily degraded versions spans at least 0.56."""
LEAST = 0.05
"""An image of a smaller span, such as a blank page, is shown as it is: contrast would be noise."""
NO_TINT = 0.06
"""An image stays as it is if the factors of its channels differ less than this from 1."""
ROOM = 0.15
"""How far the span may exceed that of the reduced image: noise has extreme values too."""


Scale = float | npt.NDArray[np.floating[Any]]
"""One number, or one for each channel (3, 1, 1)."""


class Levels:
    """An image with other black and white: values v become `gain` * v + `offset`."""

    def __init__(self, source: Rows, gain: Scale, offset: Scale) -> None:
        self.source, self.gain, self.offset, self.height, self.width = source, gain, offset, source.height, source.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        band: Band = (self.source.read(start, stop) * self.gain + self.offset).clip(-1, 1)
        return band.astype("float32")


class Change(NamedTuple):
    """A change of an image, and the way back."""

    show: Callable[[Rows], Rows] = unchanged
    back: Callable[[Rows], Rows] = unchanged

    @classmethod
    def of_levels(cls, gain: Scale, offset: Scale) -> Change:
        """Return the change of `Levels`."""
        return cls(partial(Levels, gain=gain, offset=offset), partial(Levels, gain=1 / gain, offset=-offset / gain))


def shown_to_networks(source: Rows) -> Shown:
    """Return an image in skin tones if it has no colours, else with a weaker tint; a flat image gets full contrast."""
    small = reduced(source)
    contrast = full_contrast(source, small)
    tones = in_skin_tones(contrast.show(source), contrast.show(small))
    if tones is not None:
        return Shown(tones.rows, in_turn(tones.back, contrast.back), tones.again)
    tint = weaker_tint(small)
    if tint.show is not unchanged:
        source, small = tint.show(source), tint.show(small)
        contrast = full_contrast(source, small)
    return Shown(contrast.show(source), in_turn(contrast.back, tint.back))


def in_turn(first: Callable[[Rows], Rows], second: Callable[[Rows], Rows]) -> Callable[[Rows], Rows]:
    """Return a function that makes one change after the other."""
    if first is unchanged or second is unchanged:
        return second if first is unchanged else first
    return lambda rows: second(first(rows))


def full_contrast(source: Rows, small: Rows) -> Change:
    """Return the change that gives a flat image full contrast; small: `reduced(source)`."""
    low, high = span_of(source, small)
    if not 2 * LEAST < high - low < 2 * FLAT:
        return Change()
    gain = 2 / (high - low)
    return Change.of_levels(gain, -1 - gain * low)


def weaker_tint(small: Rows) -> Change:
    """Return the change that weakens the tint of an image; small: `reduced` of it."""
    factors = balancing_factors(small)[:, None, None]
    if abs(factors - 1).max() < NO_TINT:
        return Change()
    return Change.of_levels(factors, factors - 1)  # -1 is black


def span_of(source: Rows, small: Rows) -> tuple[float, float]:
    """Return the lowest and highest value of an image in [-1, 1], over its channels, without the outliers of noise.

    small: `reduced(source)`. If its span is not flat, it is the result, and the image is not read.
    """
    low, high = _span(small)
    if small is source or high - low >= 2 * FLAT:
        return low, high
    darkest, brightest = _span(source)
    return max(darkest, low - 2 * ROOM), min(brightest, high + 2 * ROOM)


def _span(source: Rows) -> tuple[float, float]:
    low, high = 1.0, -1.0
    for span in bands(source.height, source.width):
        band = source.read(*span)
        low, high = min(low, float(band.min())), max(high, float(band.max()))
    return low, high
