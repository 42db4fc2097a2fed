"""Plan overlapping tiles and blend the results of the tiles with weights, on numpy arrays or PyTorch tensors.

Symbols as in StableSR: T is the side of a tile, O the overlap, L the length of an axis, W the weights. The caller
chooses the unit: pixels or latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pfstorer_rt.arrays import Array, like
from pfstorer_rt.errors import SettingError

Weights = npt.NDArray[np.float64]

_VARIANCE = 0.01  # variance of the gaussian in units of the squared tile side


class Tile(NamedTuple):
    """A rectangle of the canvas: first row, first column, height and width."""

    y: int
    x: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns; `canvas[..., rows, columns]` is the tile."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)


def axis_offsets(length: int, tile: int, overlap: int) -> list[int]:
    """Place the fewest tiles that cover one axis with at least `overlap` between neighbours.

    n is the smallest n >= 1 with (n-1)(T-O)+T >= L. The offsets are k(T-O); the last is L-T, so that every tile lies
    inside the axis.
    Raises ValueError if the axis is shorter than a tile or the overlap is not in 0..tile-1.
    Source: StableSR's `_sliding_windows`.
    """
    if not 0 <= overlap < tile:
        raise SettingError(f"overlap {overlap} for a tile of {tile}; expected 0 to {tile - 1}")
    if length < tile:
        raise ValueError(f"length {length} is shorter than the tile of {tile}; enlarge or pad first")
    stride = tile - overlap
    n = 1 + -(-(length - tile) // stride)
    return [k * stride for k in range(n - 1)] + [length - tile]


def even_offsets(length: int, tile: int, overlap: int) -> list[int]:
    """Place the same number of tiles as `axis_offsets`, evenly spaced, so that all overlaps are nearly equal.

    Raises ValueError as `axis_offsets` does.
    """
    n = len(axis_offsets(length, tile, overlap))
    return [round(k * (length - tile) / max(1, n - 1)) for k in range(n)]


def kept_spans(offsets: Sequence[int], tile: int) -> list[tuple[int, int]]:
    """Cut an axis in the middle of each overlap; returns the kept (start, stop) of each tile.

    Use it for networks with a bounded receptive field. If half the overlap exceeds the radius of the receptive field,
    the kept parts equal the output of the network on the whole image.
    """
    cuts = [(left + tile + right) // 2 for left, right in pairwise(offsets)]
    return list(pairwise([offsets[0], *cuts, offsets[-1] + tile]))


def plan_tiles(height: int, width: int, tile: int, overlap: int, even: bool = False) -> list[Tile]:
    """Cover a canvas with square tiles, row by row from the top left.

    even: use `even_offsets` instead of StableSR's `axis_offsets`.
    Raises ValueError as `axis_offsets` does.
    """
    place = even_offsets if even else axis_offsets
    rows, columns = place(height, tile, overlap), place(width, tile, overlap)
    return [Tile(y, x, tile, tile) for y in rows for x in columns]


@lru_cache(maxsize=16)
def gaussian_weights(height: int, width: int) -> Weights:
    """Return gaussian blending weights of a tile, largest in its centre: (height, width), read-only.

    W[y, x] = g(y) g(x) with g(u) = exp(-(u-m)^2 / (2 * 0.01 T^2)) / sqrt(2 pi * 0.01), T the side along
    the axis, m = T/2 along y and (T-1)/2 along x. The asymmetry matches StableSR. The
    corner weights are about 3e-10, below the range of float16: accumulate in float32 or wider.
    Source: StableSR's `_gaussian_weights`, with a side per axis.
    """
    weights = np.outer(_gaussian(height, height / 2), _gaussian(width, (width - 1) / 2))
    weights.flags.writeable = False  # all callers share the cached array
    return weights


def _gaussian(side: int, middle: float) -> Weights:
    u = np.arange(side, dtype=np.float64)
    density = np.exp(-((u - middle) ** 2) / (2 * _VARIANCE * side**2)) / np.sqrt(2 * np.pi * _VARIANCE)
    return np.asarray(density, dtype=np.float64)


def ramp_weights(tiles: Sequence[Tile]) -> Weights:
    """Return blending weights of evenly spaced tiles, (h, w): 1 in the centre, decreasing across the overlap.

    The ramp along each axis is sin^2(pi/2 * (d + 1/2) / O), with the distance d from the border and the overlap O,
    limited to half a tile. The weights of two tiles that overlap by O pixels add up to 1, with a smooth derivative at
    both ends of the ramp.
    """
    lines = []
    for axis in (0, 1):
        side, offsets = tiles[0][axis + 2], sorted({tile[axis] for tile in tiles})
        shared = side - max((b - a for a, b in pairwise(offsets)), default=side)
        distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
        lines.append(np.sin(np.pi / 2 * np.minimum(1, distance / max(0.5, min(shared, side / 2)))) ** 2)
    return np.outer(*lines)


class Blender:
    """Accumulates the weighted mean of patches on a canvas.

    Patches are float32 or float64, of one kind: numpy arrays, or tensors on one device. The canvas has their kind.
    weights: (h, w), if all tiles have this size; None uses `gaussian_weights` of each tile.
    """

    def __init__(self, channels: int, height: int, width: int, weights: Weights | None = None) -> None:
        self._shape = (channels, height, width)
        self._weights = weights
        self._whole: Array = None
        self._total: Array = None
        self._mass: Array = None
        self._placed: dict[tuple[int, int], Array] = {}  # weights in the kind of the patches
        self._covered = np.zeros((height, width), bool)  # on the host, so that no check waits for a GPU

    def add(self, tile: Tile, patch: Array) -> None:
        """Add the result of one tile: (C, tile.height, tile.width).

        Raises ValueError if the tile extends beyond the canvas, or the patch or the weights have another size.
        """
        self._check(tile, patch)
        if self._total is None and self._whole is None and tuple(patch.shape) == self._shape:
            # (p * w) / w differs from p in floating point. One tile must equal an untiled result bit for bit.
            self._whole = patch * 1
            return
        self._begin_accumulating(patch)
        self._accumulate(tile, patch)

    def result(self, rows: int | None = None) -> Array:
        """Return the blended canvas, (C, height, width), or its first `rows` rows.

        Raises ValueError if no tile covers some pixel.
        """
        if self._whole is not None:
            return self._whole[:, :rows]
        if self._total is None:
            raise ValueError("nothing was added to blend")
        if missing := np.count_nonzero(~self._covered[:rows]):
            raise ValueError(f"{missing} of {self._covered.size} pixels lie under no tile")
        return self._total[:, :rows] / self._mass[:rows]

    def drop(self, rows: int) -> None:
        """Remove the first rows of the canvas and append as many empty rows at the bottom."""
        if self._whole is not None:
            self._begin_accumulating(self._whole)
        for plane in (self._total, self._mass[None]):
            kept = plane[:, rows:] * 1  # a copy, because the two parts overlap
            plane[:, kept.shape[1] :] = 0
            plane[:, : kept.shape[1]] = kept
        self._covered = np.pad(self._covered[rows:], ((0, rows), (0, 0)))

    def _begin_accumulating(self, example: Array) -> None:
        if self._total is None:
            self._total = like(np.zeros(self._shape), example)
            self._mass = like(np.zeros(self._shape[1:]), example)
        if self._whole is not None:  # a second patch follows a patch of the whole canvas
            whole, self._whole = self._whole, None
            self._accumulate(Tile(0, 0, *self._shape[1:]), whole)

    def _accumulate(self, tile: Tile, patch: Array) -> None:
        size, (rows, columns) = (tile.height, tile.width), tile.slices
        weights = gaussian_weights(*size) if self._weights is None else self._weights
        if size not in self._placed:
            self._placed[size] = like(weights, patch)
        self._total[:, rows, columns] += patch * self._placed[size]
        self._mass[rows, columns] += self._placed[size]
        self._covered[rows, columns] |= weights != 0

    def _check(self, tile: Tile, patch: Array) -> None:
        channels, height, width = self._shape
        inside = 0 <= tile.y <= height - tile.height and 0 <= tile.x <= width - tile.width
        if not inside:
            raise ValueError(f"{tile} is not inside the canvas of {height} x {width}")
        if tuple(patch.shape) != (channels, tile.height, tile.width):
            raise ValueError(f"patch of shape {tuple(patch.shape)}; expected {(channels, tile.height, tile.width)}")
        if self._weights is not None and self._weights.shape != tuple(patch.shape[1:]):
            raise ValueError(f"weights of shape {self._weights.shape}; expected {tuple(patch.shape[1:])}")


def blend(
    tiles: Sequence[Tile],
    patches: Iterable[Array],
    height: int,
    width: int,
    weights: Weights | None = None,
) -> Array:
    """Blend one patch per tile into a canvas by the weighted mean.

    tiles: at least one. patches: (C, h, w) in the order of `tiles`, consumed one at a time; kinds as in `Blender`.
    weights: as for `Blender`. Returns (C, height, width). The patch of a single tile over the whole canvas is returned
    unchanged.
    Raises ValueError if a pixel is not covered, sizes differ, or the numbers of patches and tiles differ.
    """
    blender: Blender | None = None
    for tile, patch in zip(tiles, patches, strict=True):
        blender = blender or Blender(patch.shape[0], height, width, weights)
        blender.add(tile, patch)
    if blender is None:
        raise ValueError("no tiles to blend")
    return blender.result()


def blend_by_rows(
    tiles: Sequence[Tile], patches: Iterable[Array], height: int, width: int
) -> Iterator[tuple[int, Array]]:
    """Blend with gaussian weights as `blend` does; yields (first row, (C, n, width)) as soon as rows are complete.

    tiles: a grid that covers the canvas, row by row from the top. Memory holds one row of tiles.
    """
    blender, top, channels = None, 0, 0
    for i, (tile, patch) in enumerate(zip(tiles, patches, strict=True)):
        if blender is None or tile.y > top:
            if blender is not None:
                yield top, blender.result(tile.y - top)
                blender.drop(tile.y - top)
            top, channels = tile.y, patch.shape[0]
            blender = blender or Blender(channels, tile.height, width)
        blender.add(tile._replace(y=0), patch)
        if i == len(tiles) - 1:
            yield top, blender.result()


def pad_to_multiple(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Return the rows and columns of padding at the bottom and right: (-h % m, -w % m).

    StableSR pads an axis by a whole multiple if only the other axis needs padding; this function does not.
    """
    return -height % multiple, -width % multiple
