"""Synthetic degradation: makes a low-quality image (LQ) from a high-quality image (HQ), deterministic for a seed.

The second-order model of Real-ESRGAN with StableSR's settings, plus PFStorer's additions (section 4: ISP noise
after SCUNet, motion blur, median blur). Every draw comes from the numpy generator in the arguments; no global random
state is read or written. One image is degraded on the CPU; for a batch on a GPU, use `degrade_batch`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pfstorer_rt.degradation.blur import gaussian_kernel, generalized_kernel, motion_kernel, sinc_kernel
from pfstorer_rt.degradation.draws import (
    log_uniform,
    random_blur_kernel,
    random_camera,
    random_final_kernel,
    random_mode,
    random_motion_kernel,
    random_quality,
    random_size,
    scaled_size,
)
from pfstorer_rt.degradation.levels import (
    BLUR_KINDS,
    LEVELS,
    RESIZE_MODES,
    DegradationConfig,
    StageConfig,
    level_config,
)
from pfstorer_rt.degradation.steps import PHOTONS, filter_batch, isp_batch, median_batch, resize_batch

__all__ = [
    "BLUR_KINDS",
    "LEVELS",
    "RESIZE_MODES",
    "DegradationConfig",
    "StageConfig",
    "add_gaussian_noise",
    "add_poisson_noise",
    "degrade",
    "degrade_small",
    "filter2d",
    "gaussian_kernel",
    "generalized_kernel",
    "isp_noise",
    "jpeg",
    "median_blur",
    "motion_kernel",
    "random_blur_kernel",
    "resize",
    "sinc_kernel",
]


def degrade(
    image: torch.Tensor,
    level: DegradationConfig | str = "heavy",
    seed: int | np.random.Generator = 0,
) -> torch.Tensor:
    """Degrade one image at random, and enlarge the result to the size of the input.

    image: (3, H, W) float32 in [0, 1], RGB, of any size from 1 x 1. level: a name in `LEVELS` or a config. seed: a
    number, or a generator, which is advanced. Returns a new tensor of the same shape, dtype, and device, in [0, 1].
    With probability `p_hq` the result is a copy of the image.
    Raises `ValueError` for another shape, dtype, or range, and for an unknown level.
    Source: PFStorer section 4; StableSR's released settings for the ranges and the order of steps.
    """
    small = degrade_small(image, level, seed)
    if small.shape == image.shape:
        return small
    return resize(small, (image.shape[-2], image.shape[-1]), "bicubic").clamp(0, 1)


def degrade_small(
    image: torch.Tensor,
    level: DegradationConfig | str = "heavy",
    seed: int | np.random.Generator = 0,
) -> torch.Tensor:
    """Degrade one image as `degrade` does, without the enlargement at the end.

    Use it for methods that enlarge their input. Arguments and errors are as in `degrade`. Returns a new tensor of shape
    (3, H / sf, W / sf), rounded, in [0, 1]. With probability `p_hq` the result is a copy of the image.
    """
    config = level_config(level)
    _check_image(image)
    rng = np.random.default_rng(seed)
    hq = image.detach()
    if rng.random() < config.p_hq:
        return hq.clone()
    small = scaled_size((hq.shape[-2], hq.shape[-1]), 1 / config.sf)
    x = _camera(hq, config, rng)
    x = _blur_resize_noise(x, config.second, small, rng)
    return _finish(x, config, small, rng)


def _camera(hq: torch.Tensor, config: DegradationConfig, rng: np.random.Generator) -> torch.Tensor:
    # The order of a real capture: motion, lens blur, sensor noise, smoothing (median) and compression.
    x = hq
    if rng.random() < config.motion_prob:
        x = filter2d(x, random_motion_kernel(config, rng))
    x = _blur_resize_noise(x, config.first, (hq.shape[-2], hq.shape[-1]), rng)
    if rng.random() < config.isp_prob:
        x = isp_noise(x, rng, log_uniform(rng, config.isp_shot), log_uniform(rng, config.isp_read))
    if rng.random() < config.median_prob:
        x = median_blur(x, int(rng.choice(config.median_sizes)))
    return jpeg(x, random_quality(config.first, rng))


def _blur_resize_noise(
    x: torch.Tensor, stage: StageConfig, base: tuple[int, int], rng: np.random.Generator
) -> torch.Tensor:
    """Run a stage without its JPEG compression; `base` is the (H, W) that the random scale multiplies."""
    if rng.random() < stage.blur_prob:
        x = filter2d(x, random_blur_kernel(stage, rng))
    x = resize(x, random_size(stage, base, rng), random_mode(rng)).clamp(0, 1)
    grey = bool(rng.random() < stage.grey_prob)
    if rng.random() < stage.gaussian_prob:
        return add_gaussian_noise(x, rng.uniform(*stage.gaussian_sigma), rng, grey)
    return add_poisson_noise(x, rng.uniform(*stage.poisson_scale), rng, grey)


def _finish(
    x: torch.Tensor, config: DegradationConfig, small: tuple[int, int], rng: np.random.Generator
) -> torch.Tensor:
    # Both orders occur in images from the web: sharpening before the last save, or afterwards in the viewer.
    kernel = None
    if rng.random() < config.final_sinc_prob:
        kernel = random_final_kernel(config, rng)
    mode, quality = random_mode(rng), random_quality(config.second, rng)
    jpeg_last = bool(rng.random() < 0.5)
    x = x if jpeg_last else jpeg(x, quality)
    x = resize(x, small, mode)
    x = x if kernel is None else filter2d(x, kernel)
    return jpeg(x, quality) if jpeg_last else x.clamp(0, 1)


def filter2d(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolve every channel with one kernel, keeping the size; the image is mirrored at its borders.

    image is (C, H, W) float; kernel is (k, k), k odd. In an image that is not larger than half the kernel, the border
    pixels are repeated instead. Returns (C, H, W), not clamped.
    """
    k = kernel.shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != k or k % 2 == 0:
        raise ValueError(f"kernel has shape {tuple(kernel.shape)}; give a square of odd size")
    return filter_batch(image[None], [kernel])[0]


def resize(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Resize (C, H, W) to (C, *size) with "area", "bilinear", or "bicubic"; "bicubic" may overshoot.

    "bilinear" and "bicubic" have no antialiasing when they reduce an image, as in simple software.
    """
    return resize_batch(image[None], size, mode)[0]


def add_gaussian_noise(image: torch.Tensor, sigma: float, rng: np.random.Generator, grey: bool = False) -> torch.Tensor:
    """Add white noise of standard deviation sigma (in 0..255) to (C, H, W) in [0, 1].

    grey: use the same noise for all channels. Returns the same shape, clamped to [0, 1].
    """
    shape = (1 if grey else image.shape[0], *image.shape[1:])
    return (image + _normal(shape, rng, image) * (sigma / 255)).clamp(0, 1)


def add_poisson_noise(image: torch.Tensor, scale: float, rng: np.random.Generator, grey: bool = False) -> torch.Tensor:
    """Add photon noise to (C, H, W) in [0, 1]: 256 photons at white, standard deviation multiplied by scale.

    The variance at a value v is scale^2 * v / 256. grey: use the noise of the channels' mean for all channels.
    Returns the same shape, clamped to [0, 1].
    """
    signal = image.mean(0, keepdim=True) if grey else image
    signal = signal.clamp_min(0)
    counts = torch.from_numpy(rng.poisson((signal * PHOTONS).cpu().numpy())).to(image)
    return (image + scale * (counts / PHOTONS - signal)).clamp(0, 1)


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Compress and decompress (3, H, W) in [0, 1] as a JPEG of quality 1 to 100 (4:2:0 colour)."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    decoded = np.array(Image.open(buffer))
    return torch.from_numpy(decoded).permute(2, 0, 1).to(image) / 255


def median_blur(image: torch.Tensor, size: int) -> torch.Tensor:
    """Replace every pixel of (C, H, W) by the median of its size x size neighbours, channel by channel."""
    return median_batch(image[None], size)[0]


def isp_noise(image: torch.Tensor, rng: np.random.Generator, shot: float, read: float) -> torch.Tensor:
    """Convert the image to a camera's raw mosaic, add sensor noise there, and convert it back.

    image is (3, H, W) in [0, 1]. The noise has variance shot * raw + read^2. The camera (tone, colour matrix, white
    balance) is drawn at random and is the same in both conversions, so a uniform image without noise is unchanged.
    Unlike white noise, the result is coarse and coloured, and brighter regions are noisier. Returns the same shape in
    [0, 1]. Source: PFStorer section 4 names SCUNet's ISP model; this simplified model is ours.
    """
    camera = random_camera(rng)
    height, width = image.shape[-2:]
    noise = _normal((1, 1, height + 2, width + 2), rng, image)
    return isp_batch(image[None], [camera], [shot], [read], noise)[0]


def _normal(shape: Sequence[int], rng: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32)).to(like)


def _check_image(image: torch.Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected (3, H, W): one RGB image")
    if image.dtype != torch.float32:
        raise ValueError(f"image has dtype {image.dtype}; expected torch.float32: use .float() / 255")
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):  # written so that NaN fails as well
        raise ValueError(f"image has values in [{low:.4g}, {high:.4g}]; expected [0, 1]: rescale or clamp it")
