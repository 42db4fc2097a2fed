"""Image similarity: PSNR, and SSIM through scikit-image."""

from __future__ import annotations

import numpy as np

from pfstorer_rt.imaging.rows import Pixels

SSIM_WINDOW = 11
"""Minimum side in pixels; SSIM is not defined below it."""


def psnr(output: Pixels, target: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two (H, W, 3) images in [0, 1]; infinite for equal images."""
    error = float(np.mean((output.astype(np.float64) - target.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(output: Pixels, target: Pixels) -> float:
    """Structural similarity of two (H, W, 3) images in [0, 1] (Wang 2004: gaussian window, sigma 1.5)."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            output,
            target,
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def mean_gradient(pixels: Pixels) -> float:
    """Return the mean absolute difference of neighbouring pixels of (H, W, 3), vertical plus horizontal."""
    return sum(float(np.abs(np.diff(pixels, axis=axis)).mean()) for axis in (0, 1) if pixels.shape[axis] > 1)
