"""Synthetic degradation of a batch of tiles on any device, with the distributions and the steps of `degrade`.

Parameters are drawn on the host, pixel noise on the device. No pixel is copied to the host, and the host does not wait
for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from pfstorer_rt.degradation import draws
from pfstorer_rt.degradation.jpeg import jpeg_batch
from pfstorer_rt.degradation.levels import DegradationConfig, StageConfig, level_config
from pfstorer_rt.degradation.steps import (
    filter_batch,
    gaussian_noise_batch,
    isp_batch,
    median_batch,
    poisson_noise_batch,
    resize_batch,
    to_device,
)

Size = tuple[int, int]


def degrade_batch(
    images: torch.Tensor, levels: Sequence[DegradationConfig | str], rng: np.random.Generator, group: int = 8
) -> torch.Tensor:
    """Degrade tiles at random, each with its own level, and enlarge the results to the size of the input.

    images: (B, 3, H, W) float32 in [0, 1], RGB, on any device with float64; the range is not checked. levels: B names
    in `LEVELS` or configs. rng: is advanced, and determines the result on one kind of device. group: tiles with equal
    configs are degraded in groups of at most this number. A group has one random scale and one interpolation for each
    resize; all other parameters are drawn per tile. A tile stays unchanged with its config's probability `p_hq`.
    Returns a new tensor of the same shape, dtype, and device.
    Raises `ValueError` for another shape or dtype, another number of levels, or a group below 1.
    Source: the same as `pfstorer_rt.degradation.degrade.degrade`.
    """
    _check(images, levels, group)
    noise = torch.Generator(images.device).manual_seed(int(rng.integers(2**63)))
    result = images.detach().clone()
    # Lower precision would change the steps' rounding.
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for config, tiles in _groups([level_config(level) for level in levels], group, rng):
            index = to_device(torch.tensor(tiles), images.device)
            result.index_copy_(0, index, _degrade_group(images.index_select(0, index), config, rng, noise))
    return result


def _groups(
    configs: Sequence[DegradationConfig], largest: int, rng: np.random.Generator
) -> list[tuple[DegradationConfig, list[int]]]:
    """Return the numbers of the tiles to degrade, in groups with one config."""
    tiles: dict[DegradationConfig, list[int]] = {}
    for number, config in enumerate(configs):
        if rng.random() >= config.p_hq:
            tiles.setdefault(config, []).append(number)
    return [
        (config, numbers[start : start + largest])
        for config, numbers in tiles.items()
        for start in range(0, len(numbers), largest)
    ]


def _degrade_group(
    hq: torch.Tensor, config: DegradationConfig, rng: np.random.Generator, noise: torch.Generator
) -> torch.Tensor:
    full = (hq.shape[-2], hq.shape[-1])
    small = draws.scaled_size(full, 1 / config.sf)
    x = _camera(hq, config, rng, noise)
    x = _blur_resize_noise(x, config.second, small, rng, noise)
    x = _finish(x, config, small, rng)
    return resize_batch(x, full, "bicubic").clamp(0, 1)


def _camera(
    x: torch.Tensor, config: DegradationConfig, rng: np.random.Generator, noise: torch.Generator
) -> torch.Tensor:
    # The order of a real capture: motion, lens blur, sensor noise, smoothing (median) and compression.
    moved = _chosen(len(x), config.motion_prob, rng)
    x = _for_some(x, moved, lambda part: _filter(part, lambda: draws.random_motion_kernel(config, rng)))
    x = _blur_resize_noise(x, config.first, (x.shape[-2], x.shape[-1]), rng, noise)
    sensed = _chosen(len(x), config.isp_prob, rng)
    x = _for_some(x, sensed, lambda part: _isp(part, config, rng, noise))
    smoothed = _chosen(len(x), config.median_prob, rng)
    sizes = rng.choice(config.median_sizes, len(x))
    for size in set(config.median_sizes):
        x = _for_some(x, smoothed & (sizes == size), partial(median_batch, size=size))
    return jpeg_batch(x, _qualities(config.first, len(x), rng))


def _blur_resize_noise(
    x: torch.Tensor, stage: StageConfig, base: Size, rng: np.random.Generator, noise: torch.Generator
) -> torch.Tensor:
    """Run a stage without its JPEG compression; `base` is the (H, W) that the random scale multiplies."""
    blurred = _chosen(len(x), stage.blur_prob, rng)
    x = _for_some(x, blurred, lambda part: _filter(part, lambda: draws.random_blur_kernel(stage, rng)))
    x = resize_batch(x, draws.random_size(stage, base, rng), draws.random_mode(rng)).clamp(0, 1)
    return _add_noise(x, stage, rng, noise)


def _add_noise(x: torch.Tensor, stage: StageConfig, rng: np.random.Generator, noise: torch.Generator) -> torch.Tensor:
    count = len(x)
    gaussian, grey = _chosen(count, stage.gaussian_prob, rng), _chosen(count, stage.grey_prob, rng)
    for chosen, add, strengths in (
        (gaussian, gaussian_noise_batch, rng.uniform(*stage.gaussian_sigma, count)),
        (~gaussian, poisson_noise_batch, rng.uniform(*stage.poisson_scale, count)),
    ):
        x = _for_some(x, chosen, partial(add, strengths=strengths[chosen], grey=grey[chosen], generator=noise))
    return x


def _finish(x: torch.Tensor, config: DegradationConfig, small: Size, rng: np.random.Generator) -> torch.Tensor:
    # Both orders occur in images from the web: sharpening before the last save, or afterwards in the viewer.
    last = _chosen(len(x), 0.5, rng)
    x = _for_some(x, ~last, lambda part: jpeg_batch(part, _qualities(config.second, len(part), rng)))
    x = resize_batch(x, small, draws.random_mode(rng))
    sharpened = _chosen(len(x), config.final_sinc_prob, rng)
    x = _for_some(x, sharpened, lambda part: _filter(part, lambda: draws.random_final_kernel(config, rng)))
    return _for_some(x, last, lambda part: jpeg_batch(part, _qualities(config.second, len(part), rng))).clamp(0, 1)


def _filter(x: torch.Tensor, kernel: Callable[[], torch.Tensor]) -> torch.Tensor:
    return filter_batch(x, [kernel() for _ in range(len(x))])


def _isp(x: torch.Tensor, config: DegradationConfig, rng: np.random.Generator, noise: torch.Generator) -> torch.Tensor:
    count, _, height, width = x.shape
    cameras = [draws.random_camera(rng) for _ in range(count)]
    shots = [draws.log_uniform(rng, config.isp_shot) for _ in range(count)]
    reads = [draws.log_uniform(rng, config.isp_read) for _ in range(count)]
    sensor = torch.randn(count, 1, height + 2, width + 2, generator=noise, device=x.device)
    return isp_batch(x, cameras, shots, reads, sensor)


def _for_some(x: torch.Tensor, chosen: np.ndarray, step: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Run a step, which keeps the size, on the chosen images of a batch."""
    if not chosen.any():
        return x
    if chosen.all():
        return step(x)
    index = to_device(torch.from_numpy(np.flatnonzero(chosen)), x.device)
    return x.index_copy(0, index, step(x.index_select(0, index)))


def _chosen(count: int, probability: float, rng: np.random.Generator) -> np.ndarray:
    return rng.random(count) < probability


def _qualities(stage: StageConfig, count: int, rng: np.random.Generator) -> list[int]:
    return [draws.random_quality(stage, rng) for _ in range(count)]


def _check(images: torch.Tensor, levels: Sequence[DegradationConfig | str], group: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W): a batch of RGB images")
    if images.dtype != torch.float32:
        raise ValueError(f"images have dtype {images.dtype}; expected torch.float32: use .float() / 255")
    if isinstance(levels, str) or len(levels) != len(images):
        raise ValueError(f"levels are {levels!r}; give a sequence of {len(images)}, one per image")
    if group < 1:
        raise ValueError(f"group is {group}; give the largest number of tiles that share a size, at least 1")
