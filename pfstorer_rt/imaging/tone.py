"""Images of one hue, such as grey and sepia photographs: the networks see them in the tones of skin, and the result has
the hue of the image.

The bases are trained on colour photographs. In grey, they take weak lips and noses for skin and remove them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pfstorer_rt.imaging.bands import Grey, is_grey
from pfstorer_rt.imaging.rows import Band, Rows, bands, read_ahead

Tone = npt.NDArray[np.float64]
"""(3, 3): coefficients 1, y, y² of the difference of every channel from the luma y in [-1, 1]."""
ONE_HUE = 1.5 * 2 / 255
"""Largest RMS deviation of a channel from its tone, in the range of [-1, 1]. JPEG files of toned images had up to 1.0
levels of 255; 150 colour portraits had at least 3.7."""


SKIN = np.array([0.16, -0.048, -0.1725], np.float32)
"""How much more red, green and blue skin has than grey of the same luma, in the range of [-1, 1], for `SkinToned`."""


class SkinToned:
    """An image in the tones of skin: every channel is a function of the luma, which stays.

    Black and white stay too. The colour is strongest at the luma of bright skin.
    """

    def __init__(self, source: Rows) -> None:
        self.source, self.height, self.width = source, source.height, source.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        luma = luma_of(self.source.read(start, stop)).clip(-1, 1)
        return np.stack([luma + share * (1 - luma**2) * (1 + luma) for share in SKIN]).astype(np.float32)


class Toned:
    """An image with the tone of another image: every channel is a function of the luma."""

    def __init__(self, source: Rows, tone: Tone) -> None:
        self.source, self.tone, self.height, self.width = source, tone, source.height, source.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        luma = luma_of(self.source.read(start, stop))
        channels = [luma + a + b * luma + c * luma**2 for a, b, c in self.tone]
        return np.stack(channels).clip(-1, 1).astype(np.float32)


def find_tone(source: Rows) -> Tone | None:
    """Fit the tone of an image by least squares; None for an image with several hues. The image is read once."""

    def sums(start: int, stop: int) -> tuple[npt.NDArray[np.float64], ...]:
        band = source.read(start, stop).astype(np.float64)
        luma = luma_of(band)
        powers = np.stack([np.ones_like(luma), luma, luma**2]).reshape(3, -1)
        differences = (band - luma).reshape(3, -1)
        return powers @ powers.T, differences @ powers.T, (differences**2).sum(1)

    parts = read_ahead(sums, bands(source.height, source.width))
    moments, products, squares = (np.sum(part, 0) for part in zip(*parts, strict=True))
    tone: Tone = products @ np.linalg.pinv(moments)
    remaining = (squares - (tone * products).sum(1)) / (source.height * source.width)
    return tone if remaining.max() <= ONE_HUE**2 else None


def keep_hue(source: Rows) -> Callable[[Rows], Rows] | None:
    """Return what gives a result the hue of a grey or toned image; None for an image with several hues."""
    if is_grey(source):
        return Grey
    tone = find_tone(source)
    return None if tone is None else partial(Toned, tone=tone)


def luma_of(band: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the luma (n, W) of a band (ITU-R BT.601)."""
    luma: npt.NDArray[Any] = np.tensordot(Grey.WEIGHTS.astype(band.dtype), band, 1)
    return luma
