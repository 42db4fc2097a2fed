"""Removal of scratches, dust and creases from an image before its restoration.

A small network finds the damage and fills it (`training.scratches`). The restorer then sees a whole face: its own
training has no such damage, and it takes scratches for hair or wrinkles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from pfstorer_rt.arrays import HostArray
from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.imaging.bands import Resized
from pfstorer_rt.imaging.rows import Band, Rows, Spool, read_whole
from pfstorer_rt.imaging.tone import one_hue
from pfstorer_rt.tiling import axis_offsets

WEIGHTS = Path(__file__).with_name("scratches.onnx")
TILE, MARGIN = 512, 64
"""Largest side of the network's input, and the part of it beside another tile whose output is not used, in pixels."""
MULTIPLE = 16
"""Both sides of the network's input are multiples of this many pixels."""
LONGEST = 2048
"""Longest side of the image that the network sees; larger images are reduced for it."""
UNCERTAIN, CERTAIN = 0.25, 0.6
"""Opacities up to which a pixel is left as it is, and from which it is replaced."""

FindDamage = Callable[[HostArray], tuple[HostArray, HostArray]]
"""find(image (1, 3, H, W) in [-1, 1]) -> opacity (1, 1, H, W) in [0, 1], fill (1, 3, H, W) in [-1, 1]."""


class WithoutScratches:
    """An image whose damaged pixels are replaced."""

    def __init__(self, source: Rows, opacity: Band, fill: Band) -> None:
        """opacity (1, h, w) in [0, 1] and fill (3, h, w): of the image or a reduced one."""
        self.source, self.height, self.width = source, source.height, source.width
        self._opacity, self._fill = (
            Resized(Spool.of(part), self.height, self.width, antialias=False) for part in (opacity, fill)
        )

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        band, opacity = self.source.read(start, stop), self._opacity.read(start, stop)
        if not opacity.any():
            return band
        return band + opacity.clip(0, 1) * (self._fill.read(start, stop) - band)


def without_scratches(source: Rows, find: FindDamage | None = None) -> Rows:
    """Remove the damage of an image; an image without damage is returned as it is.

    A grey image stays grey, and a sepia image keeps its hue. find: None selects the shipped network.
    """
    share = LONGEST / max(source.height, source.width)
    height, width = (max(1, round(n * share)) for n in (source.height, source.width))
    small = read_whole(source if share >= 1 else Resized(source, height, width, antialias=True))
    opacity, fill = find_damage(small, find or shipped_network())
    if not opacity.any():
        return source
    if (hue := one_hue(source)) is not None:
        fill = read_whole(hue(Spool.of(fill)))
    return WithoutScratches(source, opacity, fill)


def find_damage(image: Band, find: FindDamage) -> tuple[Band, Band]:
    """Return the opacity (1, H, W) of the damage and the filled image (3, H, W) of an image (3, H, W) in [-1, 1]."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (0, -height % MULTIPLE), (0, -width % MULTIPLE)), "edge")
    opacity, fill = np.zeros((1, *padded.shape[1:]), np.float32), np.empty_like(padded)
    for top in starts(padded.shape[1]):
        for left in starts(padded.shape[2]):
            tile = np.ascontiguousarray(padded[None, :, top : top + TILE, left : left + TILE])
            y, x = (MARGIN if start else 0 for start in (top, left))  # the tile before has the rows and columns above
            for whole, part in zip((opacity, fill), find(tile), strict=True):
                whole[:, top + y : top + TILE, left + x : left + TILE] = part[0, :, y:, x:]
    shares = ((opacity - UNCERTAIN) / (CERTAIN - UNCERTAIN)).clip(0, 1)
    return shares[:, :height, :width], fill[:, :height, :width]


def starts(length: int) -> list[int]:
    """Return the first pixels of tiles that cover an axis; neighbours overlap by two margins or more."""
    side = min(TILE, length)
    return axis_offsets(length, side, min(2 * MARGIN, side - 1))


@cache
def shipped_network() -> FindDamage:
    """Open the network on the CPU."""
    session = OnnxRuntimeSession(WEIGHTS, "cpu")

    def find(image: HostArray) -> tuple[HostArray, HostArray]:
        outputs = session.run(image=image)
        return outputs["opacity"], outputs["fill"]

    return find
