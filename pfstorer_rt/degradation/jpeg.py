"""JPEG compression and decompression as torch operations on a batch of images, on any device with float64.

Only the loss is computed: colour conversion, 4:2:0 reduction, transform, and rounding. No file is made.
Source: ITU-T T.81 (transform, tables), ITU-T T.871 (colour conversion); quality and interpolation follow libjpeg.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pfstorer_rt.degradation.steps import to_device

_LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)  # T.81, table K.1

_CHROMA = np.full((8, 8), 99)  # T.81, table K.2
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


def jpeg_batch(images: torch.Tensor, qualities: Sequence[int]) -> torch.Tensor:
    """Compress and decompress images as JPEG with 4:2:0 colour, each with its own quality.

    images is (B, 3, H, W) float in [0, 1]; values outside are clamped. qualities are B numbers from 1 to 100, with
    libjpeg's meaning. Colour is enlarged linearly, as libjpeg does by default. Returns the same shape with whole levels
    of 8 bits, divided by 255. Raises `ValueError` for another number of qualities or a quality out of range.
    """
    if len(qualities) != len(images) or not all(1 <= quality <= 100 for quality in qualities):
        raise ValueError(f"qualities are {list(qualities)}; give {len(images)} numbers from 1 to 100, one per image")
    height, width = images.shape[-2:]
    pixels = (images.clamp(0, 1) * 255).round()
    luma, chroma = _from_rgb(F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate"))
    luma = _quantize(luma, _tables(_LUMA, qualities))
    chroma = _quantize(F.avg_pool2d(chroma, 2).round(), _tables(_CHROMA, qualities))
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False).round()
    return _to_rgb(luma, chroma)[..., :height, :width].round().clamp(0, 255) / 255


def _from_rgb(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert (B, 3, H, W) in 0..255 to luma (B, 1, H, W) and chroma (B, 2, H, W), rounded, in the same range."""
    red, green, blue = pixels.split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.cat([(blue - luma) / 1.772, (red - luma) / 1.402], dim=1) + 128
    return luma.round(), chroma.round().clamp(0, 255)


def _to_rgb(luma: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:
    cb, cr = (chroma - 128).split(1, dim=1)
    green = luma - (0.114 * 1.772 / 0.587) * cb - (0.299 * 1.402 / 0.587) * cr
    return torch.cat([luma + 1.402 * cr, green, luma + 1.772 * cb], dim=1)


def _quantize(planes: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Round the transform of every 8 x 8 block of (B, C, H, W) in 0..255 to multiples of the image's table, (B, 64)."""
    count, channels, height, width = planes.shape
    grid = planes.view(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    # float64: on some devices, float32 products are rounded to 10 bits, which would move the rounding below.
    blocks = grid.reshape(count, -1, 64).double() - 128
    matrix, steps = to_device(_TRANSFORM, planes.device), to_device(tables, planes.device)[:, None]
    rounded = (blocks @ matrix.T / steps).round() * steps
    restored = (rounded @ matrix + 128).round().clamp(0, 255).to(planes.dtype)
    return restored.view(grid.shape).transpose(3, 4).reshape(planes.shape)


def _tables(base: np.ndarray, qualities: Sequence[int]) -> torch.Tensor:
    """Scale a table for each quality as libjpeg does; returns (B, 64)."""
    percent = [5000 // quality if quality < 50 else 200 - 2 * quality for quality in qualities]
    steps = (base.reshape(1, 64) * np.array(percent)[:, None] + 50) // 100
    return torch.from_numpy(steps.clip(1, 255))


def _transform() -> torch.Tensor:
    """Make the (64, 64) matrix of the two-dimensional cosine transform of a block, row by row."""
    frequency, position = np.mgrid[0:8, 0:8]
    cosine = np.cos((2 * position + 1) * frequency * np.pi / 16) / 2
    cosine[0] /= np.sqrt(2)
    return torch.from_numpy(np.kron(cosine, cosine))


_TRANSFORM = _transform()
