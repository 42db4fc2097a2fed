"""Colour fix: combine the colours of the input image with the detail of the result (StableSR 3.5).

Tensors are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F

from pfstorer_rt.errors import SettingError

ColorFix = Literal["adain", "wavelet", "none"]
Statistics = tuple[torch.Tensor, torch.Tensor]
"""Mean and standard deviation of each channel, (B, 3, 1, 1)."""

WAVELET_REACH = 31
"""Radius of the wavelet filter in pixels: 1 + 2 + 4 + 8 + 16."""


def adain_color_fix(content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Match the mean and standard deviation of each channel of `content` to `style`.

    (c - mean_c) / std_c * std_s + mean_s per image and channel, std = sqrt(unbiased variance + 1e-5).
    content, style: (B, 3, H, W) in [-1, 1], sizes may differ. Returns the shape and dtype of `content`,
    not clamped.
    Source: StableSR's `adaptive_instance_normalization`.
    """
    return match_statistics(content, channel_statistics([content]), channel_statistics([style]))


def match_statistics(content: torch.Tensor, own: Statistics, wanted: Statistics) -> torch.Tensor:
    """Apply AdaIN with given statistics, for example statistics of the whole image applied to one band."""
    fixed = (content.float() - own[0]) / own[1] * wanted[1] + wanted[0]
    return fixed.to(content.dtype)


def channel_statistics(bands: Iterable[torch.Tensor]) -> Statistics:
    """Return each channel's mean and sqrt(unbiased variance + 1e-5) over all pixels of all bands, (1, 3, 1, 1) each.

    bands: (1, 3, h, W) in sequence, at least one pixel in total. Bands are merged in fp64 (Chan et al. 1979).
    """
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)
    for band in bands:
        n, wide = band[0, 0].numel(), band.float()
        near = wide.mean((2, 3), keepdim=True)  # two passes: torch.var_mean is eight times slower on a tile
        variance, middle = (wide - near).square().mean((2, 3), keepdim=True).double(), near.double()
        gap = middle - mean.to(middle.device) if count else middle * 0
        squares = squares.to(gap.device) + variance * n + gap**2 * (count * n / (count + n))
        mean = middle - gap * (count / (count + n))
        count += n
    # The unbiased variance of one pixel is 0/0; the biased variance is 0.
    return mean.float(), (squares / max(1, count - 1) + 1e-5).sqrt().float()


def wavelet_color_fix(content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Combine the high frequencies of `content` with the low frequencies of `style`.

    Five levels of an a-trous [1 2 1]/4 blur with dilation 1, 2, 4, 8, 16 split each image into low and
    high; the result is high(content) + low(style).
    content, style: (B, 3, H, W) in [-1, 1], equal shapes, any size. Returns the shape and dtype of `content`,
    not clamped. Raises ValueError if the shapes differ.
    Source: StableSR's `wavelet_reconstruction`.
    """
    if content.shape != style.shape:
        raise ValueError(f"content {tuple(content.shape)} and style {tuple(style.shape)}; expected one shape")
    wide = content.float()
    # The sum of the differences between levels telescopes to the image minus its last blur.
    fixed = wide - _wavelet_low(wide) + _wavelet_low(style.float())
    return fixed.to(content.dtype)


def color_fix(content: torch.Tensor, style: torch.Tensor, kind: ColorFix) -> torch.Tensor:
    """Apply the colour fix named "adain", "wavelet" or "none"; tensors as in `wavelet_color_fix`.

    Raises ValueError for an unknown name.
    """
    if kind not in _COLOR_FIXES:
        raise SettingError(f"colour fix {kind!r}; expected one of {', '.join(_COLOR_FIXES)}")
    return _COLOR_FIXES[kind](content, style)


_COLOR_FIXES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "adain": adain_color_fix,
    "wavelet": wavelet_color_fix,
    "none": lambda content, style: content,
}


def _wavelet_low(x: torch.Tensor) -> torch.Tensor:
    # Separable [1 2 1]/4: sums of shifted images need less memory than a convolution, which unfolds nine copies.
    for level in range(5):
        reach = 2**level
        for axis, pad in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
            wide, n = F.pad(x, pad, mode="replicate"), x.shape[axis]
            x = (wide.narrow(axis, 0, n) + wide.narrow(axis, 2 * reach, n)).mul_(0.25).add_(x, alpha=0.5)
    return x
