"""Two-dimensional filter kernels for blurring: gaussian family, circular low-pass, straight motion.

Every kernel is a (size, size) float32 tensor with odd size that sums to 1 and does not change when it is
turned by half a turn, so that correlation and convolution with it are the same.
"""

from __future__ import annotations

import math

import torch


def generalized_kernel(
    size: int,
    sigma_x: float,
    sigma_y: float | None = None,
    theta: float = 0.0,
    beta: float = 1.0,
    plateau: bool = False,
) -> torch.Tensor:
    """Make an elliptic bell: exp(-q^beta / 2), or 1 / (1 + q^beta) for a plateau.

    q is the squared distance from the centre in units of the two sigmas (pixels); the sigma_x axis is turned
    by theta (radians) from the columns towards the rows; sigma_y None means round. beta = 1 without plateau
    is the gaussian, a smaller beta has heavier tails, a larger one steeper sides. Returns (size, size)
    float32. Raises ValueError for an even size or a sigma that is not positive.
    Source: Real-ESRGAN (arXiv 2107.10833), section 3.1.
    """
    sigma_y = sigma_x if sigma_y is None else sigma_y
    if min(sigma_x, sigma_y, beta) <= 0:
        raise ValueError(f"sigmas and beta are {sigma_x}, {sigma_y}, {beta}; all must be above 0")
    x, y = _grid(size)
    along, across = _turned(x, y, theta)
    power = ((along / sigma_x) ** 2 + (across / sigma_y) ** 2) ** beta
    return _normalized(1 / (1 + power) if plateau else torch.exp(-power / 2))


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float | None = None, theta: float = 0.0) -> torch.Tensor:
    """Make a gaussian with the given standard deviations in pixels, turned by theta (radians).

    Returns (size, size) float32; the same arguments and errors as `generalized_kernel`.
    """
    return generalized_kernel(size, sigma_x, sigma_y, theta)


def sinc_kernel(size: int, cutoff: float) -> torch.Tensor:
    """Make the ideal circular low-pass filter, cut to the kernel's square: it rings, as sharpening does.

    cutoff is the radius of the pass band in radians per pixel, in (0, pi]; returns (size, size) float32.
    Raises ValueError for an even size or a cutoff outside. The formula is the inverse Fourier transform of
    a disc, cutoff * J1(cutoff * r) / (2 * pi * r). Source: Real-ESRGAN (arXiv 2107.10833), section 3.3.
    """
    if not 0 < cutoff <= math.pi:
        raise ValueError(f"cutoff is {cutoff}; give radians per pixel above 0 and up to pi")
    x, y = _grid(size)
    phase = cutoff * torch.hypot(x, y)
    # J1(p) / p tends to 1/2; the constant factors are left to the normalization.
    return _normalized(torch.where(phase > 0, torch.special.bessel_j1(phase) / phase.clamp_min(1e-12), 0.5))


def motion_kernel(length: float, angle: float, size: int | None = None) -> torch.Tensor:
    """Make the trace of a straight, even camera motion: an anti-aliased line through the centre.

    length is in pixels, at least 1; angle in radians, from the columns towards the rows; size None takes the
    smallest odd size that holds the line. Returns (size, size) float32. Raises ValueError for a shorter
    length, an even size, or a size that would cut the line. Source: PFStorer (arXiv 2403.08436) adds motion
    blur to the degradation; its form is ours.
    """
    needed = 2 * math.ceil((length - 1) / 2) + 1
    size = needed if size is None else size
    if length < 1 or size < needed:
        raise ValueError(f"length {length} in a kernel of {size}; give a length >= 1 and a size >= {needed}")
    x, y = _grid(size)
    along, across = _turned(x, y, angle)
    end = ((length + 1) / 2 - along.abs()).clamp(0, 1)
    return _normalized(end * (1 - across.abs()).clamp_min(0))


def _grid(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel size is {size}; give an odd number, so that the kernel has a centre")
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _turned(x: torch.Tensor, y: torch.Tensor, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    c, s = math.cos(theta), math.sin(theta)
    return c * x + s * y, c * y - s * x


def _normalized(kernel: torch.Tensor) -> torch.Tensor:
    return (kernel / kernel.sum()).float()
