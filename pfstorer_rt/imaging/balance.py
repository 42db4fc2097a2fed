"""White balance: the networks see tinted images with a weaker tint, and the result has the tint of the image again.

The bases and the identities are trained on photographs with usual colours. In a strong tint, likeness is lost.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pfstorer_rt.imaging.rows import Rows, read_whole
from pfstorer_rt.imaging.tone import luma_of

BRIGHT = 0.98
"""Quantile of the values of a channel that is taken for the white of an image."""
USUAL = np.array([(-0.03, 0.22), (-0.10, 0.03), (-0.27, 0.12)])
"""Lower and upper limits of the logarithm of this white in red, green and blue, relative to the luma's, after the
correction. About nine tenths of 580 photographs of faces have values between them before it."""
KEPT = 0.5
"""Share of the logarithm that stays within these limits: the brightest part of a portrait can be skin."""
DARKEST = 0.05
"""Smallest white of a channel."""
LARGEST = 1.5
"""Largest factor of a channel, so that its noise is not amplified further; its inverse is the smallest one."""


def balancing_factors(small: Rows) -> npt.NDArray[np.float32]:
    """Return the factors (3,) of the channels that weaken the tint of an image; small: `tone.reduced` of it."""
    image = (read_whole(small) + 1) / 2
    white = np.maximum(np.quantile(image, BRIGHT, axis=(1, 2)), DARKEST)
    tint = np.log(white / luma_of(white[:, None, None]).item())
    factors = np.exp(np.clip(KEPT * tint, *USUAL.T) - tint)
    return factors.clip(1 / LARGEST, LARGEST).astype(np.float32)
