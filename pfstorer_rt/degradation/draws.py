"""Random parameters of the degradation's steps; every draw comes from the numpy generator in the arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pfstorer_rt.degradation.blur import generalized_kernel, motion_kernel, sinc_kernel
from pfstorer_rt.degradation.levels import BLUR_KINDS, RESIZE_MODES, DegradationConfig, Range, StageConfig
from pfstorer_rt.degradation.steps import Camera


def random_blur_kernel(stage: StageConfig, rng: np.random.Generator) -> torch.Tensor:
    """Draw a blur kernel of a stage: a circular low-pass filter, or one of the six `BLUR_KINDS`.

    Returns (k, k) float32 that sums to 1, with odd k in the stage's `kernel_size`.
    """
    size = _odd(rng, stage.kernel_size)
    if rng.random() < stage.sinc_prob:
        # A small kernel cannot represent low frequencies, so its smallest cutoff is higher.
        return sinc_kernel(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    kind = BLUR_KINDS[_pick(rng, stage.kind_probs)]
    sigma_x = rng.uniform(*stage.sigma)
    sigma_y, theta = sigma_x, 0.0
    if kind.endswith("aniso"):
        sigma_y, theta = rng.uniform(*stage.sigma), rng.uniform(-math.pi, math.pi)
    plateau = kind.startswith("plateau")
    beta = 1.0
    if plateau or kind.startswith("gen"):
        beta = _either_side_of_one(rng, stage.beta_plateau if plateau else stage.beta_gen)
    return generalized_kernel(size, sigma_x, sigma_y, theta, beta, plateau)


def random_motion_kernel(config: DegradationConfig, rng: np.random.Generator) -> torch.Tensor:
    """Draw the kernel of a motion blur, (k, k) float32, with odd k."""
    return motion_kernel(rng.uniform(*config.motion_length), rng.uniform(0, math.pi))


def random_final_kernel(config: DegradationConfig, rng: np.random.Generator) -> torch.Tensor:
    """Draw the circular low-pass filter of the last reduction, (k, k) float32, with odd k."""
    return sinc_kernel(_odd(rng, config.second.kernel_size), rng.uniform(math.pi / 3, math.pi))


def random_size(stage: StageConfig, base: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Draw the (height, width) of a stage's resize: `base` times a random scale, at least one pixel."""
    low, high = ((1.0, stage.resize[1]), (stage.resize[0], 1.0), (1.0, 1.0))[_pick(rng, stage.resize_probs)]
    return scaled_size(base, float(rng.uniform(low, high)))


def scaled_size(base: tuple[int, int], scale: float) -> tuple[int, int]:
    """Multiply a (height, width) by a scale; both stay at least 1."""
    return max(1, round(base[0] * scale)), max(1, round(base[1] * scale))


def random_mode(rng: np.random.Generator) -> str:
    """Draw the interpolation of a resize, one of `RESIZE_MODES`."""
    return RESIZE_MODES[int(rng.integers(len(RESIZE_MODES)))]


def random_quality(stage: StageConfig, rng: np.random.Generator) -> int:
    """Draw the quality of a stage's JPEG compression."""
    return int(rng.integers(*stage.jpeg, endpoint=True))


def random_camera(rng: np.random.Generator) -> Camera:
    """Draw the tone, colour matrix and white balance of a camera."""
    gamma = rng.uniform(2.0, 2.4)
    # Rows sum to 1, so grey stays grey. Off-diagonal values are <= 0, so the inverse keeps values in [0, 1].
    leak = torch.from_numpy(rng.uniform(0.05, 0.35, (3, 3)))
    leak.fill_diagonal_(0)
    matrix = (torch.eye(3, dtype=torch.float64) + torch.diag(leak.sum(1)) - leak).float()
    return Camera(gamma, matrix, torch.tensor([rng.uniform(1.5, 2.5), 1.0, rng.uniform(1.3, 2.2)]))


def log_uniform(rng: np.random.Generator, bounds: Range) -> float:
    """Draw a number whose logarithm is uniform between the bounds' logarithms."""
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))


def _either_side_of_one(rng: np.random.Generator, bounds: Range) -> float:
    # Half of the draws are below 1 and half above; a uniform draw from a wide range would give mostly flat tops.
    low, high = (bounds[0], 1.0) if rng.random() < 0.5 else (1.0, bounds[1])
    return float(rng.uniform(low, high))


def _pick(rng: np.random.Generator, probabilities: Sequence[float]) -> int:
    return int(rng.choice(len(probabilities), p=probabilities))


def _odd(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0] // 2, (bounds[1] - 1) // 2, endpoint=True)) * 2 + 1
