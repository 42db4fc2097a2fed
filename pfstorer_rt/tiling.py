"""Plan overlapping tiles, weigh them, and blend what was computed on each: on numpy arrays or tensors.

T is a tile's side, O the overlap, L the length of an axis, W the weights, as in StableSR. The unit is
the caller's, pixels or latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.errors import SettingError

Array = npt.NDArray[np.floating[Any]]
Patch = Array | torch.Tensor

_VARIANCE = 0.01  # of the gaussian, in units of the squared tile side


class Tile(NamedTuple):
    """A rectangle of the canvas: its first row and column, and its size."""

    y: int
    x: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns; `canvas[..., rows, columns]` is the tile."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)


def axis_offsets(length: int, tile: int, overlap: int) -> list[int]:
    """Place the fewest tiles that cover one axis, neighbours sharing at least `overlap`.

    n is the least n >= 1 with (n-1)(T-O)+T >= L; the offsets are k(T-O), the last one L-T, so that no
    tile leaves the axis.
    Raises ValueError where the axis is shorter than a tile, or the overlap is not in 0..tile-1.
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
    """Place as many tiles as `axis_offsets` does, at equal distances: the excess is shared by all overlaps.

    Raises ValueError as `axis_offsets` does.
    """
    n = len(axis_offsets(length, tile, overlap))
    return [round(k * (length - tile) / max(1, n - 1)) for k in range(n)]


def kept_spans(offsets: Sequence[int], tile: int) -> list[tuple[int, int]]:
    """Cut an axis in the middle of each overlap: (start, stop) of what is kept of each tile.

    For networks that see a bounded neighbourhood: what is nearer to a border than they see is thrown away, so that
    the kept parts together are what the network makes of the whole.
    """
    cuts = [(left + tile + right) // 2 for left, right in pairwise(offsets)]
    return list(pairwise([offsets[0], *cuts, offsets[-1] + tile]))


def plan_tiles(height: int, width: int, tile: int, overlap: int, even: bool = False) -> list[Tile]:
    """Cover a canvas with square tiles, row by row from the top left.

    even: at equal distances (`even_offsets`), not StableSR's.
    Raises ValueError as `axis_offsets` does.
    """
    place = even_offsets if even else axis_offsets
    rows, columns = place(height, tile, overlap), place(width, tile, overlap)
    return [Tile(y, x, tile, tile) for y in rows for x in columns]


@lru_cache(maxsize=16)
def gaussian_weights(height: int, width: int) -> npt.NDArray[np.float64]:
    """Weigh a tile's pixels by how far they are from its border: (height, width), read-only.

    W[y, x] = g(y) g(x) with g(u) = exp(-(u-m)^2 / (2 * 0.01 T^2)) / sqrt(2 pi * 0.01), T the side along
    that axis, m = T/2 along y and (T-1)/2 along x. The asymmetry is StableSR's and kept for parity. The
    corners weigh about 3e-10, which float16 cannot hold: accumulate in float32 or wider.
    Source: StableSR's `_gaussian_weights`, with a side per axis.
    """
    weights = np.outer(_gaussian(height, height / 2), _gaussian(width, (width - 1) / 2))
    weights.flags.writeable = False  # every caller gets the same cached array
    return weights


def _gaussian(side: int, middle: float) -> npt.NDArray[np.float64]:
    u = np.arange(side, dtype=np.float64)
    density = np.exp(-((u - middle) ** 2) / (2 * _VARIANCE * side**2)) / np.sqrt(2 * np.pi * _VARIANCE)
    return np.asarray(density, dtype=np.float64)


def ramp_weights(tiles: Sequence[Tile]) -> npt.NDArray[np.float64]:
    """Weigh the pixels of evenly placed tiles: 1 inside, falling to the border over what neighbours share: (h, w).

    Along each axis the fall is sin^2(pi/2 * (d + 1/2) / O), d the distance from the border and O the overlap, at
    most half a tile. Where two tiles share O pixels their weights add up to 1, with no kink at either end.
    """
    lines = []
    for axis in (0, 1):
        side, offsets = tiles[0][axis + 2], sorted({tile[axis] for tile in tiles})
        shared = side - max((b - a for a, b in pairwise(offsets)), default=side)
        distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
        lines.append(np.sin(np.pi / 2 * np.minimum(1, distance / max(0.5, min(shared, side / 2)))) ** 2)
    return np.outer(*lines)


@lru_cache(maxsize=16)
def _weights_on(height: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`gaussian_weights` where they are used, so that they are not copied to a GPU for each tile of each step."""
    return torch.tensor(gaussian_weights(height, width), dtype=dtype, device=device)


class Blender:
    """Weighted mean of patches on a canvas, one patch at a time, in float32 or the patches' wider type.

    Patches are numpy arrays, or tensors of one device; the result is of their kind and stays on their device.
    weights: (h, w), for tiles all of that size; None for `gaussian_weights` of each tile.
    """

    def __init__(self, channels: int, height: int, width: int, weights: Array | None = None) -> None:
        self._shape = (channels, height, width)
        self._weights = weights
        self._numpy = True
        self._whole: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        self._mass = torch.zeros(0)
        self._given: torch.Tensor | None = None
        self._covered = np.zeros((height, width), bool)  # known without asking a GPU for it

    def add(self, tile: Tile, patch: Patch) -> None:
        """Add what was computed on one tile: (C, tile.height, tile.width).

        Raises ValueError where the tile leaves the canvas, or the patch or the weights are of another size.
        """
        self._check(tile, patch)
        self._numpy = not isinstance(patch, torch.Tensor)
        tensor = patch if isinstance(patch, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(patch))
        if self._total is None and self._whole is None and tuple(tensor.shape) == self._shape:
            # (p * w) / w is not p in floating point; one tile must equal no tiling, bit for bit.
            self._whole = tensor.to(_accumulator(tensor.dtype), copy=True)
            return
        self._begin_accumulating()
        self._accumulate(tile, tensor)

    def result(self, rows: int | None = None) -> Any:
        """Blend what was added: (C, height, width), or the first `rows` rows of it; float32 or wider.

        Raises ValueError where a pixel of the canvas lies under no tile.
        """
        blended = None if self._whole is None else self._whole[:, :rows]
        if blended is None:
            if self._total is None:
                raise ValueError("nothing was added to blend")
            if missing := np.count_nonzero(~self._covered[:rows]):
                raise ValueError(f"{missing} of {self._covered.size} pixels lie under no tile")
            blended = self._total[:, :rows] / self._mass[:rows]
        return blended.numpy() if self._numpy else blended

    def drop(self, rows: int) -> None:
        """Move the canvas down: its first rows leave it, and as many empty ones come in at the bottom."""
        self._begin_accumulating()
        assert self._total is not None
        for plane, empty in ((self._total, 0), (self._mass[None], 0)):
            kept = plane[:, rows:].clone()
            plane[:, kept.shape[1] :] = empty
            plane[:, : kept.shape[1]] = kept
        self._covered = np.pad(self._covered[rows:], ((0, rows), (0, 0)))

    def _begin_accumulating(self) -> None:
        if self._whole is not None:  # a second patch after a whole one: an ordinary blend after all
            whole, self._whole = self._whole, None
            self._accumulate(Tile(0, 0, *self._shape[1:]), whole)

    def _accumulate(self, tile: Tile, patch: torch.Tensor) -> None:
        if self._total is None:
            dtype = _accumulator(patch.dtype)
            self._total = torch.zeros(self._shape, dtype=dtype, device=patch.device)
            self._mass = torch.zeros(self._shape[1:], dtype=dtype, device=patch.device)
        rows, columns = tile.slices
        if self._weights is None:
            weights = _weights_on(tile.height, tile.width, self._total.dtype, self._total.device)
            self._covered[rows, columns] = True
        else:
            if self._given is None:
                self._given = torch.from_numpy(self._weights.astype(np.float64)).to(self._total)
            weights = self._given
            self._covered[rows, columns] |= self._weights != 0
        self._total[:, rows, columns] += patch * weights
        self._mass[rows, columns] += weights

    def _check(self, tile: Tile, patch: Patch) -> None:
        channels, height, width = self._shape
        inside = 0 <= tile.y <= height - tile.height and 0 <= tile.x <= width - tile.width
        if not inside:
            raise ValueError(f"{tile} is not inside the canvas of {height} x {width}")
        if tuple(patch.shape) != (channels, tile.height, tile.width):
            raise ValueError(f"patch of shape {tuple(patch.shape)}; expected {(channels, tile.height, tile.width)}")
        if self._weights is not None and self._weights.shape != tuple(patch.shape[1:]):
            raise ValueError(f"weights of shape {self._weights.shape}; expected {tuple(patch.shape[1:])}")


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def blend(
    tiles: Sequence[Tile],
    patches: Iterable[Array],
    height: int,
    width: int,
    weights: Array | None = None,
) -> Array:
    """Blend one patch a tile into a canvas by their weighted mean.

    tiles: at least one. patches: (C, h, w) arrays in the order of `tiles`, taken one at a time.
    weights: as for `Blender`. Returns (C, height, width), float32 or the patches' wider type; a single
    tile over the whole canvas is returned unchanged.
    Raises ValueError where a pixel is uncovered, sizes differ, or there is not one patch a tile.
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
    """Blend as `blend` does with gaussian weights, and yield (first row, (C, n, width)) as soon as rows are complete.

    tiles: on a grid, row by row from the top, covering the canvas. Memory is that of one row of tiles.
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
    """Count the rows and columns to add below and to the right: (-h % m, -w % m).

    StableSR adds a whole extra multiple to an axis that needs none when the other does; this does not.
    """
    return -height % multiple, -width % multiple


def seam_ratio(picture: Array, tiles: Sequence[Tile], grid: int = 1) -> float:
    """Return the mean gradient across the tiles' borders, divided by that at all other multiples of `grid` pixels.

    picture: (H, W, C); tiles: in its pixels. grid: pixels per latent pixel, as what a decoder makes has a faint grid of
    that size by itself. 1 where no seam can be told from the picture itself. Infinite where
    the picture is flat but for its seams, 1 where it is flat throughout.
    """
    at, expected = 0.0, 0.0
    for axis, length in enumerate(picture.shape[:2]):
        gradient = np.abs(np.diff(picture.astype(np.float64), axis=axis)).mean((1 - axis, 2))
        borders: set[int] = {t[axis] for t in tiles} | {t[axis] + t[axis + 2] for t in tiles}
        places = [b - 1 for b in sorted(borders) if 0 < b < length]
        others = [p - 1 for p in range(grid, length, grid) if p not in borders]
        at += float(gradient[places].sum())
        # By axis: a picture may be rougher along one, which has more or fewer borders than the other.
        expected += len(places) * float(gradient[others].mean() if others else 0)
    if at == expected == 0:
        return 1.0
    return at / expected if expected else float("inf")
