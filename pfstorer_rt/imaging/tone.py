"""Grey, toned and pale images: the networks see them in the tones of skin, and the result has the hue of the image.

The bases are trained on colour photographs. In grey, they take weak lips and noses for skin and remove them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pfstorer_rt.imaging.bands import Grey, Resized, is_grey
from pfstorer_rt.imaging.rows import Band, Rows, Spool, bands, read_ahead, read_whole

Tone = npt.NDArray[np.float64]
"""(3, 3): coefficients 1, y, y² of the difference of every channel from the luma y in [-1, 1]."""
ONE_HUE = 1.5 * 2 / 255
"""Largest RMS deviation of a channel from its tone, in the range of [-1, 1]. JPEG files of toned images had up to 1.0
levels of 255; 150 colour portraits had at least 3.7."""
PALE, COLOURFUL = 2.5 * 2 / 255, 3.7 * 2 / 255
"""The same deviation, up to which an image is shown in the tones of skin, and from which it is shown as it is; between
them, the change becomes smaller. It is measured in the `reduced` image: scans of grey photographs have noise
of many hues, which the reduction removes."""
REDUCED = 64
"""Short side in pixels."""
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
        return (luma + skin(luma)).astype(np.float32)


def skin(luma: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the difference (3, n, W) of skin from grey of a luma (n, W) in [-1, 1]."""
    shades: npt.NDArray[Any] = SKIN[:, None, None] * (1 - luma**2) * (1 + luma)
    return shades


class Shifted:
    """An image whose tone is moved towards that of skin; the deviations of its pixels from the tone stay."""

    def __init__(self, source: Rows, tone: Tone, weight: float) -> None:
        """weight: 1 replaces the tone by that of skin, -1 undoes it."""
        self.source, self.tone, self.weight, self.height, self.width = source, tone, weight, source.height, source.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        band = self.source.read(start, stop)
        luma = luma_of(band).clip(-1, 1)
        shifted = band + self.weight * (skin(luma) - shades_of(self.tone, luma))
        return shifted.clip(-1, 1).astype(np.float32)


class Toned:
    """An image with the tone of another image: every channel is a function of the luma."""

    def __init__(self, source: Rows, tone: Tone) -> None:
        self.source, self.tone, self.height, self.width = source, tone, source.height, source.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        luma = luma_of(self.source.read(start, stop))
        return (luma + shades_of(self.tone, luma)).clip(-1, 1).astype(np.float32)


def shades_of(tone: Tone, luma: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the difference (3, n, W) of the channels from a luma (n, W)."""
    return np.stack([a + b * luma + c * luma**2 for a, b, c in tone])


def fit_tone(source: Rows) -> tuple[Tone, float]:
    """Fit the tone of an image by least squares; returns it, and the largest RMS deviation of a channel from it.

    The image is read once.
    """

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
    return tone, float(np.sqrt(max(0.0, remaining.max())))


def unchanged(rows: Rows) -> Rows:
    """Return the argument."""
    return rows


def one_hue(source: Rows) -> Callable[[Rows], Rows] | None:
    """Return the function that gives images the hue of a grey or toned image; None for an image of several hues."""
    if is_grey(source):
        return Grey
    tone, deviation = fit_tone(source)
    return partial(Toned, tone=tone) if deviation <= ONE_HUE else None


class Shown(NamedTuple):
    """An image as the networks see it, and the way back."""

    rows: Rows
    back: Callable[[Rows], Rows] = unchanged
    """Gives a result of the networks the contrast and the hue of the image."""
    again: Callable[[Rows], Rows] = unchanged
    """Gives a result of the networks the tones of `rows`, for a second pass."""


def reduced(source: Rows) -> Rows:
    """Reduce an image to a short side of `REDUCED` pixels, in memory."""
    ratio = REDUCED / min(source.height, source.width)
    if ratio >= 1:
        return source
    small = Resized(source, round(source.height * ratio), round(source.width * ratio), antialias=True)
    return Spool.of(read_whole(small))


def in_skin_tones(source: Rows, small: Rows) -> Shown | None:
    """Show a grey, toned or pale image in the tones of skin; None for a colourful image.

    small: `reduced(source)`. A colourful image is not read.
    """
    overall, deviation = fit_tone(small)
    weight = min(1.0, (COLOURFUL - deviation) / (COLOURFUL - PALE))
    if weight <= 0:
        return None
    if (back := one_hue(source)) is not None:
        return Shown(SkinToned(source), back, SkinToned)
    return Shown(Shifted(source, overall, weight), partial(Shifted, tone=overall, weight=-weight))


def luma_of(band: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the luma (n, W) of a band (ITU-R BT.601)."""
    luma: npt.NDArray[Any] = np.tensordot(Grey.WEIGHTS.astype(band.dtype), band, 1)
    return luma
