"""Colour fix: combine the colours of the input image with the detail of the result (StableSR 3.5).

Images are (..., 3, H, W) float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from pfstorer_rt.errors import SettingError

ColorFix = Literal["adain", "wavelet", "none"]
Image = npt.NDArray[np.float32]
Statistics = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Mean and standard deviation of each channel, (..., 3, 1, 1)."""

WAVELET_REACH = 31
"""Radius of the wavelet filter in pixels: 1 + 2 + 4 + 8 + 16."""


def adain_color_fix(content: Image, style: Image) -> Image:
    """Match the mean and standard deviation of each channel of `content` to `style`.

    (c - mean_c) / std_c * std_s + mean_s per image and channel, std = sqrt(unbiased variance + 1e-5).
    content, style: (..., 3, H, W) in [-1, 1], H and W may differ. Returns the shape of `content`, not clamped.
    Source: StableSR's `adaptive_instance_normalization`.
    """
    return match_statistics(content, channel_statistics([content]), channel_statistics([style]))


def match_statistics(content: Image, own: Statistics, wanted: Statistics) -> Image:
    """Apply AdaIN with given statistics, for example statistics of the whole image applied to one band."""
    return (content - own[0]) / own[1] * wanted[1] + wanted[0]


def channel_statistics(bands: Iterable[Image]) -> Statistics:
    """Return each channel's mean and sqrt(unbiased variance + 1e-5) over all pixels of all bands.

    bands: (..., 3, h, W) in sequence, at least one pixel in total. Bands are merged in float64 (Chan et al. 1979).
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for band in bands:
        n = band.shape[-2] * band.shape[-1]
        near: npt.NDArray[np.float64] = band.mean((-2, -1), np.float64, keepdims=True)
        gap = near - mean if count else near * 0
        within = np.square(band - near.astype(np.float32)).sum((-2, -1), np.float64, keepdims=True)
        squares = squares + within + gap**2 * (count * n / (count + n))
        mean = near - gap * (count / (count + n))
        count += n
    # The unbiased variance of one pixel is 0/0; the biased variance is 0.
    return mean.astype(np.float32), np.sqrt(squares / max(1, count - 1) + 1e-5).astype(np.float32)


def wavelet_color_fix(content: Image, style: Image) -> Image:
    """Combine the high frequencies of `content` with the low frequencies of `style`.

    Five levels of an a-trous [1 2 1]/4 blur with dilation 1, 2, 4, 8, 16 split each image into low and
    high; the result is high(content) + low(style).
    content, style: (..., 3, H, W) in [-1, 1], equal shapes, any size. Returns the shape of `content`, not clamped.
    Raises ValueError if the shapes differ.
    Source: StableSR's `wavelet_reconstruction`.
    """
    if content.shape != style.shape:
        raise ValueError(f"content {content.shape} and style {style.shape}; expected one shape")
    # The differences between levels add up to the image minus its last blur. The blur is linear, so one is enough for
    # both images.
    return content + _wavelet_low(style - content)


def color_fix(content: Image, style: Image, kind: ColorFix) -> Image:
    """Apply the colour fix named "adain", "wavelet" or "none"; images as in `wavelet_color_fix`.

    Raises ValueError for an unknown name.
    """
    if kind not in _COLOR_FIXES:
        raise SettingError(f"colour fix {kind!r}; expected one of {', '.join(_COLOR_FIXES)}")
    return _COLOR_FIXES[kind](content, style)


_COLOR_FIXES: dict[str, Callable[[Image, Image], Image]] = {
    "adain": adain_color_fix,
    "wavelet": wavelet_color_fix,
    "none": lambda content, style: content,
}


def _wavelet_low(x: Image) -> Image:
    # Separable [1 2 1]/4, rows and then columns: sums of shifted images.
    half, quarter = np.float32(0.5), np.float32(0.25)
    for reach in (1, 2, 4, 8, 16):
        wide = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(reach, reach)] * 2, "edge")
        tall = (wide[..., : -2 * reach, :] + wide[..., 2 * reach :, :]) * quarter + wide[..., reach:-reach, :] * half
        x = (tall[..., : -2 * reach] + tall[..., 2 * reach :]) * quarter + tall[..., reach:-reach] * half
    return x
