"""NIQE: quality of one image without a reference, by statistics of natural images (Mittal 2013).

The image is divided into blocks of 96 pixels. Each block gives 36 features. The score is the distance between the
distribution of these features and the distribution in undegraded photographs, which a file provides.
"""

from __future__ import annotations

from functools import cache
from math import gamma
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pfstorer_rt.errors import BadFileError, one_line
from pfstorer_rt.imaging.rows import Pixels

Array = npt.NDArray[np.float64]
BLOCK = 96
"""Side of a block in pixels."""
FEATURES = 36
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Offsets (rows, columns) of the four neighbours whose products with a pixel are measured."""
SHAPES = np.arange(0.2, 10.0005, 0.001)
"""Shapes of the generalized Gaussian that are compared with the values of a block."""
WINDOW = np.exp(-(np.arange(-3, 4) ** 2) / 2 / (7 / 6) ** 2)
LUMA = np.array([0.298936, 0.587043, 0.114021])
MIRRORED = 8
"""Pixels that are mirrored at the borders before the image is halved."""


class NaturalModel(NamedTuple):
    """The distribution of the features in undegraded photographs."""

    mean: Array
    """(36,)."""
    covariance: Array
    """(36, 36)."""


def read_natural_model(path: Path) -> NaturalModel:
    """Read the authors' `modelparameters.mat` or the `niqe_pris_params.npz` of the package basicsr.

    Raises `BadFileError` for another file.
    """
    from scipy.io import loadmat

    try:
        arrays = loadmat(path) if path.suffix == ".mat" else np.load(path)
        stem = "prisparam" if path.suffix == ".mat" else "pris_param"
        mean, covariance = (np.asarray(arrays[f"{name}_{stem}"], np.float64) for name in ("mu", "cov"))
    except Exception as error:  # damaged files raise many error types
        raise BadFileError(f"{path}: not the parameters of NIQE ({one_line(error)})") from error
    if mean.size != FEATURES or covariance.shape != (FEATURES, FEATURES):
        raise BadFileError(f"{path}: shapes {mean.shape} and {covariance.shape}; expected {FEATURES} features")
    return NaturalModel(mean.ravel(), covariance)


def niqe(pixels: Pixels, model: NaturalModel) -> float | None:
    """Return the score of (H, W, 3) in [0, 1], lower for a more natural image; equation 10 of the paper.

    Returns None for a side under 192 pixels, and for an image with fewer than two blocks that have structure.
    """
    if min(pixels.shape[:2]) < 2 * BLOCK:
        return None
    found = block_features(np.round(pixels.astype(np.float64) * 255 @ LUMA))
    complete = found[np.isfinite(found).all(1)]
    if len(complete) < 2:
        return None
    difference = np.nanmean(found, 0) - model.mean
    inverse = np.linalg.pinv((np.cov(complete, rowvar=False) + model.covariance) / 2)
    return float(np.sqrt(difference @ inverse @ difference))


def block_features(grey: Array) -> Array:
    """Return the features (blocks, 36) of (H, W) in 0..255: 18 at full size and 18 at half size."""
    height, width = (n // BLOCK * BLOCK for n in grey.shape)
    whole = grey[:height, :width]
    scales = [(normalized(whole), BLOCK), (normalized(halved(whole)), BLOCK // 2)]
    rows = []
    for i in range(height // BLOCK):
        for j in range(width // BLOCK):
            blocks = (values[i * side : (i + 1) * side, j * side : (j + 1) * side] for values, side in scales)
            rows.append(np.concatenate([features(block) for block in blocks]))
    return np.array(rows)


def halved(grey: Array) -> Array:
    """Reduce (H, W) to half its size by antialiased bicubic interpolation, mirrored at the borders."""
    image = Image.fromarray(np.pad(grey, MIRRORED, "symmetric").astype(np.float32))
    half = np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC), np.float64)
    return half[MIRRORED // 2 : -MIRRORED // 2, MIRRORED // 2 : -MIRRORED // 2]


def normalized(grey: Array) -> Array:
    """Subtract the local mean and divide by the local standard deviation plus 1; equation 1 of the paper."""
    mean = local_mean(grey)
    return (grey - mean) / (np.sqrt(np.abs(local_mean(grey**2) - mean**2)) + 1)


def local_mean(values: Array) -> Array:
    """Return the mean in a Gaussian window of 7 pixels."""
    from scipy.ndimage import correlate1d

    window = WINDOW / WINDOW.sum()
    return np.asarray(correlate1d(correlate1d(values, window, 0, mode="nearest"), window, 1, mode="nearest"))


def features(block: Array) -> Array:
    """Return the 18 features of a normalized block."""
    shape, _, left, right = fitted(block)
    products = [fitted(block * np.roll(block, offset, (0, 1))) for offset in NEIGHBOURS]
    return np.array([shape, (left + right) / 2, *(number for product in products for number in product)])


@cache
def ratios() -> Array:
    """Return the squared mean absolute value divided by the mean square, for each of `SHAPES`."""
    return np.array([gamma(2 / shape) ** 2 / (gamma(1 / shape) * gamma(3 / shape)) for shape in SHAPES])


def fitted(values: Array) -> tuple[float, float, float, float]:
    """Fit an asymmetric generalized Gaussian; equations 4 to 8 of the paper.

    Returns shape, mean, left scale and right scale; NaN where all values are equal.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        left, right = (np.sqrt(np.sum(part**2) / part.size) for part in (values[values < 0], values[values > 0]))
        skew = left / right
        ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    wanted = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    if not np.isfinite(wanted):
        return (np.nan,) * 4
    shape = float(SHAPES[np.argmin((ratios() - wanted) ** 2)])
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    mean = (right - left) * scale * gamma(2 / shape) / gamma(1 / shape)
    return shape, float(mean), float(left * scale), float(right * scale)
