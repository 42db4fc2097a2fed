"""Two-dimensional filter kernels for blurring: gaussian family, circular low-pass, straight motion.

Every kernel is a (size, size) float32 tensor of odd size that sums to 1. It is symmetric about its centre, so
correlation and convolution give the same result.
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
    """Make an elliptic kernel: exp(-q^beta / 2), or 1 / (1 + q^beta) for a plateau.

    q is the squared distance from the centre in units of the two sigmas (pixels). theta is the rotation of the sigma_x
    axis from the columns towards the rows, in radians. sigma_y None gives a round kernel. beta = 1 without plateau is
    the gaussian; a smaller beta has heavier tails, a larger beta steeper sides. Returns (size, size) float32. Raises
    `ValueError` for an even size or a sigma that is not positive.
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
    """Make a gaussian kernel with standard deviations in pixels, rotated by theta (radians).

    Arguments and errors are the same as for `generalized_kernel`. Returns (size, size) float32.
    """
    return generalized_kernel(size, sigma_x, sigma_y, theta)


def sinc_kernel(size: int, cutoff: float) -> torch.Tensor:
    """Make the ideal circular low-pass filter, truncated to a square: it causes ringing, as sharpening does.

    cutoff is the radius of the pass band in radians per pixel, in (0, pi]. Returns (size, size) float32.
    Raises `ValueError` for an even size or a cutoff out of range. The formula is the inverse Fourier transform of
    a disc, cutoff * J1(cutoff * r) / (2 * pi * r). Source: Real-ESRGAN (arXiv 2107.10833), section 3.3.
    """
    if not 0 < cutoff <= math.pi:
        raise ValueError(f"cutoff is {cutoff}; give radians per pixel above 0 and up to pi")
    x, y = _grid(size)
    phase = cutoff * torch.hypot(x, y)
    # The limit of J1(p) / p is 1/2; the normalization covers constant factors.
    return _normalized(torch.where(phase > 0, torch.special.bessel_j1(phase) / phase.clamp_min(1e-12), 0.5))


def motion_kernel(length: float, angle: float, size: int | None = None) -> torch.Tensor:
    """Make the kernel of a straight, uniform camera motion: an anti-aliased line through the centre.

    length is in pixels, at least 1. angle is in radians, from the columns towards the rows. size None selects the
    smallest odd size that contains the line. Returns (size, size) float32. Raises `ValueError` for a shorter length, an
    even size, or a size that truncates the line. Source: PFStorer (arXiv 2403.08436) adds motion blur to the
    degradation without a definition; this definition is ours.
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
