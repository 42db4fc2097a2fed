"""Random changes of colours, contrast and brightness, so that trained networks restore tinted, grey and faded images.

An original and its degraded version have the same change: the networks learn to keep the colours of their input.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.imaging.bands import Grey

LUMA = Grey.WEIGHTS.astype(np.float64)
"""Weights (3,) of the channels in the luma."""
TINTED, GREY = 0.3, 0.12
"""Shares of the changed images with a tint, and without colours or with weak ones."""
FADED, GAMMA = 0.2, 0.2
"""Shares with less contrast, and with another exponent."""
LEAST_SPAN = 0.3
"""Smallest span of a faded image; 1 is black to white."""


class ColorJitter(NamedTuple):
    """The changes of images v in [0, 1]: clip(`matrix` v + `offset`) ** `exponent` * `span` + `black`."""

    matrix: torch.Tensor
    """(B, 3, 3)"""
    offset: torch.Tensor
    """(B, 3)"""
    exponent: torch.Tensor
    """(B,)"""
    span: torch.Tensor
    """(B,)"""
    black: torch.Tensor
    """(B,)"""

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Change images (B, 3, H, W) in [0, 1]."""
        matrix, offset, *numbers = (part.to(images.device) for part in self)
        exponent, span, black = (part[:, None, None, None] for part in numbers)
        changed = torch.einsum("bij,bjhw->bihw", matrix, images) + offset[..., None, None]
        return (changed.clamp(0, 1) ** exponent * span + black).clamp(0, 1)


def draw_jitter(count: int, share: float, rng: np.random.Generator) -> ColorJitter:
    """Draw the changes of `count` images; share: of the images that may be changed, the others stay as they are."""
    drawn = [draw_one(rng) if rng.random() < share else (np.eye(3), np.zeros(3), 1.0, 1.0, 0.0) for _ in range(count)]
    return ColorJitter(*(torch.from_numpy(np.array(part, np.float32)) for part in zip(*drawn, strict=True)))


def draw_one(rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, float, float]:
    """Draw the parts of one `ColorJitter`."""
    matrix, offset, exponent, span, black = np.eye(3), np.zeros(3), 1.0, 1.0, 0.0
    kind = rng.random()
    if kind < TINTED:
        matrix = np.diag(draw_tint(rng))
        if rng.random() < 0.4:
            offset = rng.normal(0, 0.03, 3)
    elif kind < TINTED + GREY:
        grey = np.tile(LUMA, (3, 1))
        saturation = rng.uniform(0.05, 0.5) if rng.random() < 0.25 else 0.0
        matrix = saturation * matrix + (1 - saturation) * grey
        if rng.random() < 0.3:
            matrix = np.diag(draw_tint(rng)) @ grey
    kind = rng.random()
    if kind < FADED:
        span = rng.uniform(LEAST_SPAN, 0.85)
        black = rng.uniform(0, 0.08 if rng.random() < 0.5 else 1 - span)
    elif kind < FADED + GAMMA:
        exponent = np.exp(rng.normal(0, 0.35))
    return matrix, offset, exponent, span, black


def draw_tint(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw factors (3,) of the channels that keep the luma of grey: warm, cold, or any other tint."""
    factors = np.exp(rng.normal(0, 0.13, 3) + rng.normal(0, 0.1) * np.array([1, 0, -1]))
    tint: npt.NDArray[np.float64] = factors / (factors @ LUMA)
    return tint
