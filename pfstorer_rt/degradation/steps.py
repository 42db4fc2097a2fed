"""Steps of the degradation as torch operations on a batch of images, on any device.

No step copies pixels to the host or waits for the device. Parameters are given on the host and copied to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pfstorer_rt.degradation.levels import RESIZE_MODES

PHOTONS = 256.0
"""Photons at white for Poisson noise of strength 1: the grey levels of an 8-bit image."""

Numbers = Sequence[float] | np.ndarray
"""One number per image, on the host."""


@dataclass(frozen=True)
class Camera:
    """The conversion between a camera's raw values and an image, without its noise."""

    gamma: float
    to_screen: torch.Tensor  # (3, 3) float32: the camera's linear colours to the image's
    gains: torch.Tensor  # (3,) float32: white balance


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the host without waiting for the device."""
    # Only a copy from pinned memory runs beside the host.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def filter_batch(images: torch.Tensor, kernels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Convolve every channel of each image with the image's kernel, keeping the size; borders are mirrored.

    images is (B, C, H, W) float; kernels are B tensors (k, k) on the host, k odd, of any sizes. In images that are not
    larger than half the largest kernel, the border pixels are repeated instead. Returns (B, C, H, W), not clamped.
    """
    k = max(kernel.shape[-1] for kernel in kernels)
    margins = [(k - kernel.shape[-1]) // 2 for kernel in kernels]
    stack = torch.stack([F.pad(kernel, (m, m, m, m)) for kernel, m in zip(kernels, margins, strict=True)])[:, None]
    height, width = images.shape[-2:]
    mode = "reflect" if k // 2 < min(height, width) else "replicate"
    padded = F.pad(images, (k // 2,) * 4, mode=mode)
    # Fourier transforms are 2 to 4 times faster than conv2d at 21 x 21. Sizes are rounded up to multiples of 32
    # because a large prime factor makes the transform slow. The wrap-around affects only discarded pixels.
    full = tuple(-(-(n + k - 1) // 32) * 32 for n in (height, width))
    product = torch.fft.rfft2(padded, s=full) * torch.fft.rfft2(to_device(stack, images.device), s=full)
    result: torch.Tensor = torch.fft.irfft2(product, s=full)
    return result[..., k - 1 : k - 1 + height, k - 1 : k - 1 + width]


def resize_batch(images: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Resize (B, C, H, W) to (B, C, *size) with "area", "bilinear", or "bicubic"; "bicubic" may overshoot.

    "bilinear" and "bicubic" have no antialiasing when they reduce an image, as in simple software.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize mode is {mode!r}; choose one of {', '.join(RESIZE_MODES)}")
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode=mode, align_corners=None if mode == "area" else False)


def gaussian_noise_batch(
    images: torch.Tensor, strengths: Numbers, grey: Numbers, generator: torch.Generator
) -> torch.Tensor:
    """Add white noise to (B, 3, H, W) in [0, 1]; strengths: one standard deviation per image, in 0..255.

    grey: whether an image has the same noise in all channels. generator: on the images' device. Returns the same
    shape, clamped to [0, 1].
    """
    noise = _shared(torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype), grey)
    return (images + noise * _per_image(strengths, images) / 255).clamp(0, 1)


def poisson_noise_batch(
    images: torch.Tensor, strengths: Numbers, grey: Numbers, generator: torch.Generator
) -> torch.Tensor:
    """Add photon noise to (B, 3, H, W) in [0, 1]: 256 photons at white, standard deviation multiplied by the strength.

    The variance at a value v is strength^2 * v / 256. grey: whether an image has the noise of its channels' mean in all
    channels. generator: on the images' device. Returns the same shape, clamped to [0, 1].
    """
    mean = images.mean(1, keepdim=True).expand_as(images)
    signal = torch.where(_per_image(grey, images) > 0, mean, images).clamp_min(0)
    noise = _shared(torch.poisson(signal * PHOTONS, generator=generator) / PHOTONS - signal, grey)
    return (images + noise * _per_image(strengths, images)).clamp(0, 1)


def median_batch(images: torch.Tensor, size: int) -> torch.Tensor:
    """Replace every pixel of (B, C, H, W) by the median of its size x size neighbours, channel by channel."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"median size is {size}; give an odd number")
    height, width = images.shape[-2:]
    padded = F.pad(images, (size // 2,) * 4, mode="replicate")
    window = [padded[..., i : i + height, j : j + width] for i in range(size) for j in range(size)]
    # Of n // 2 + 2 values, neither the smallest nor the largest can be the median of all n.
    count = len(window) // 2 + 2
    kept, rest = window[:count], window[count:]
    while len(kept) > 1:
        kept, rest = _without_extremes(kept) + rest[:1], rest[1:]
    return kept[0]


def isp_batch(
    images: torch.Tensor,
    cameras: Sequence[Camera],
    shots: Numbers,
    reads: Numbers,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Convert images to their cameras' raw mosaics, add sensor noise there, and convert them back.

    images is (B, 3, H, W) in [0, 1]. The noise has variance shot * raw + read^2. noise is (B, 1, H + 2, W + 2) of
    standard deviation 1. Returns the same shape as images, in [0, 1].
    """
    gamma = _per_image([camera.gamma for camera in cameras], images)
    matrices = torch.stack([camera.to_screen for camera in cameras])
    to_screen, to_camera = (to_device(m, images.device) for m in (matrices, torch.linalg.inv(matrices)))
    gains = to_device(torch.stack([camera.gains for camera in cameras]), images.device)[:, :, None, None]
    linear = _inverse_tone(images.clamp(0, 1)) ** gamma
    raw = torch.einsum("bij,bjhw->bihw", to_camera, linear) / gains
    shot, read_variance = _per_image(shots, images), _per_image([read**2 for read in reads], images)
    developed = _sensor(raw.clamp_min(0), shot, read_variance, noise) * gains
    back = torch.einsum("bij,bjhw->bihw", to_screen, developed.clamp(0, 1))
    return _tone(back.clamp(0, 1) ** (1 / gamma))


def _sensor(raw: torch.Tensor, shot: torch.Tensor, read_variance: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Sample (B, 3, H, W) through an RGGB mosaic with noise, and interpolate the missing colours."""
    padded = F.pad(raw, (1, 1, 1, 1), mode="replicate")  # every pixel then has all neighbours
    mask = torch.zeros_like(padded[:1])
    mask[:, 0, 0::2, 0::2] = 1
    mask[:, 1, 0::2, 1::2] = 1
    mask[:, 1, 1::2, 0::2] = 1
    mask[:, 2, 1::2, 1::2] = 1
    noisy = padded + noise * (shot * padded + read_variance).sqrt()
    corner = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])  # red and blue: one pixel in four
    cross = torch.tensor([[0.0, 1, 0], [1, 4, 1], [0, 1, 0]])  # green: one pixel in two
    weight = to_device(torch.stack([corner, cross, corner])[:, None] / 4, raw.device)
    return F.conv2d(noisy * mask, weight, groups=3)


def _tone(x: torch.Tensor) -> torch.Tensor:
    return x * x * (3 - 2 * x)  # S-shaped tone curve


def _inverse_tone(y: torch.Tensor) -> torch.Tensor:
    return 0.5 - torch.sin(torch.asin(1 - 2 * y) / 3)


def _without_extremes(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sort the smallest and the largest value of every pixel to the ends, and remove these."""
    values = list(values)

    def order(low: int, high: int) -> None:
        a, b = values[low], values[high]
        values[low], values[high] = torch.minimum(a, b), torch.maximum(a, b)

    last = len(values) - 1
    for i in range(len(values) // 2):
        order(i, last - i)
    for i in range(1, last // 2 + 1):  # a middle value is compared with both ends
        order(0, i)
        order(last - i, last)
    return values[1:-1]


def _shared(noise: torch.Tensor, grey: Numbers) -> torch.Tensor:
    """Copy the first channel's noise to the other channels of the grey images."""
    return torch.where(_per_image(grey, noise) > 0, noise[:, :1], noise)


def _per_image(values: Numbers, like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.as_tensor(values, dtype=like.dtype), like.device)[:, None, None, None]
