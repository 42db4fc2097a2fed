"""Views of aligned photographs: scaled, rotated, moved and mirrored tiles, sampled on any device.

The map of a view is a matrix (3, 3) from positions in the tile to positions in the photograph, both in [-1, 1] with x
first, as in `F.affine_grid`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Maps = npt.NDArray[np.float64]
FACE: Maps = np.array([[0.70, 0.0, 0.0], [0.0, 0.70, 0.218], [0.0, 0.0, 1.0]])
"""Position of the recognizer's square in a photograph that is aligned as the FFHQ data set (Karras et al. 2019)."""
STEEP, SLIGHT = 14.0, 1.5
"""Standard deviations in degrees of the angle of a rotated view, and of some of the others."""
PART = 48
"""Views that are sampled at once, which limits the memory."""


@dataclass(frozen=True)
class ViewRange:
    """Distribution of the views of a photograph."""

    low: float
    high: float
    """Range of the side of the view; 1 is the side of the photograph, a larger view shows mirrored surroundings."""
    rotated: float
    """Share of the rotated views."""
    shift: float
    """Largest shift as a share of the largest one without mirrored surroundings."""


def draw_view_maps(count: int, views: ViewRange, rng: np.random.Generator) -> Maps:
    """Draw the maps (count, 3, 3) of views; half of them are mirrored."""
    scale = np.exp(rng.uniform(math.log(views.low), math.log(views.high), count))
    slight = rng.normal(0, SLIGHT, count) * (rng.random(count) < 0.3)
    angle = np.deg2rad(np.where(rng.random(count) < views.rotated, rng.normal(0, STEEP, count), slight))
    mirror = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    x, y = rng.uniform(-1, 1, (2, count)) * np.maximum(0.12, np.abs(1 - scale)) * views.shift
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    zero, one = np.zeros(count), np.ones(count)
    return np.stack([cos * mirror, -sin, x, sin * mirror, cos, y, zero, zero, one], 1).reshape(count, 3, 3)


def draw_shifts(count: int, size: int, rng: np.random.Generator) -> Maps:
    """Draw the maps (count, 3, 3) of shifts by whole pixels, some mirrored, which keep the pixels of a photograph.

    size: side of tile and photograph in pixels; the largest shift is 21 % of it.
    """
    reach = round(0.215 * size)
    maps = np.tile(np.eye(3), (count, 1, 1))
    maps[:, 0, 0] = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    maps[:, :2, 2] = rng.integers(-reach, reach + 1, (count, 2)) * (2 / size)
    return maps


def sample_views(photos: torch.Tensor, maps: Maps, size: int) -> torch.Tensor:
    """Sample tiles (B, 3, size, size) in [0, 1] of photographs (B, 3, S, S) uint8, at maps (B, 3, 3).

    A photograph with twice the side of the tile or more is sampled at a higher resolution and averaged.
    """
    if not len(photos):
        return photos.new_empty((0, 3, size, size), dtype=torch.float32)
    finer = max(1, photos.shape[-1] // size)
    part = max(1, PART // finer**2)
    theta = torch.from_numpy(maps[:, :2].astype(np.float32)).to(photos.device, non_blocking=True)
    tiles = []
    for some, move in zip(photos.split(part), theta.split(part), strict=True):
        grid = F.affine_grid(move, [len(some), 3, finer * size, finer * size], align_corners=False)
        tile = F.grid_sample(some.float() / 255, grid, "bicubic", "reflection", align_corners=False)
        tiles.append(F.avg_pool2d(tile, finer) if finer > 1 else tile)
    return torch.cat(tiles).clamp_(0, 1)


def faces_in_views(maps: Maps) -> npt.NDArray[Any]:
    """Return the positions (B, 2, 3) of the faces of aligned photographs in their views at maps (B, 3, 3)."""
    return (np.linalg.inv(maps) @ FACE)[:, :2]
