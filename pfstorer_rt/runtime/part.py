"""The part of a canvas on which the identity acts.

The base restores the whole canvas first, and its predictions are kept. The denoiser with the identity then runs on the
tiles around the chosen face only. At every step its predictions are blended with those of the base by the soft map of
the selection, so that both restorations agree at the border of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pfstorer_rt.imaging.rows import Band, Rows
from pfstorer_rt.runtime.layout import CodecTiles, Layout
from pfstorer_rt.runtime.selection import Selection, Weights
from pfstorer_rt.tiling import Tile


@dataclass(frozen=True)
class Part:
    """A part of a square of a layout."""

    square: Tile
    """Size of the square in latent pixels."""
    place: Tile
    """Position of the part in the square, in latent pixels: what is encoded and decoded."""
    inner: Tile
    """Position of the tiles of the denoiser in the part, in latent pixels."""
    layout: Layout
    """Layout of the part. Its tiles cover `inner`, from which their positions count."""
    weights: Weights
    """The soft map on `inner`, (h, w)."""

    @property
    def pixels(self) -> Tile:
        """Position of the part in the square, in pixels."""
        factor = self.layout.squares[0].height // self.place.height
        return Tile(*(factor * n for n in self.place))


def base_layout(layout: Layout) -> Layout:
    """Return the layout with strength 0, for the restoration by the base."""
    return replace(layout, recipe=replace(layout.recipe, strength=0.0))


def find_parts(layout: Layout, selection: Selection) -> list[Part]:
    """Return the parts of all squares on which the identity acts."""
    return [part for square in layout.squares if (part := find_part(layout, square, selection))]


def find_part(layout: Layout, square: Tile, selection: Selection) -> Part | None:
    """Return the part of a square whose tiles cover the soft map, None where the map is 0."""
    (height, width), canvas = layout.codec.shape, layout.canvas
    factor = square.height // height
    y, x = square.y + factor * (np.arange(height) + 0.5), square.x + factor * (np.arange(width) + 0.5)
    weights = selection.weights(y / canvas.height, x / canvas.width)
    touched = [tile for tile in layout.tiles if weights[tile.slices].any()]
    if not touched:
        return None
    around = _hull(touched)
    # An encoder that sees the whole square may normalize over it, so it gets the whole square again.
    place = Tile(0, 0, height, width) if layout.codec.whole else around
    inner = around._replace(y=around.y - place.y, x=around.x - place.x)
    return Part(Tile(0, 0, height, width), place, inner, _cut(layout, place, around, factor), weights[around.slices])


def _cut(layout: Layout, place: Tile, around: Tile, factor: int) -> Layout:
    """Return the layout of a part of a square."""
    fix, codec = layout.recipe.color_fix, layout.codec
    fix = ("adain" if len(layout.tiles) == 1 else "wavelet") if fix == "auto" else fix
    tiles = [tile._replace(y=tile.y - around.y, x=tile.x - around.x) for tile in layout.tiles if _inside(tile, around)]
    return replace(
        layout,
        recipe=replace(layout.recipe, color_fix=fix),
        squares=(Tile(0, 0, factor * place.height, factor * place.width),),
        tiles=tuple(tiles),
        codec=CodecTiles(place.height, place.width, codec.tile, codec.margin),
    )


def _hull(tiles: Sequence[Tile]) -> Tile:
    """Return the smallest rectangle around tiles."""
    top, left = min(tile.y for tile in tiles), min(tile.x for tile in tiles)
    bottom, right = max(tile.y + tile.height for tile in tiles), max(tile.x + tile.width for tile in tiles)
    return Tile(top, left, bottom - top, right - left)


def _inside(tile: Tile, hull: Tile) -> bool:
    return _hull((tile, hull)) == hull


Predict = Callable[[Any, int], Any]
"""predict(x, t): the prediction of a denoiser for a noisy latent (1, C, h, w)."""


def recorded(predict: Predict, predictions: list[Any]) -> Predict:
    """Return a function that appends every prediction to a list."""

    def record(x: Any, t: int) -> Any:
        predictions.append(predict(x, t))
        return predictions[-1]

    return record


def blended(predict: Predict, predictions: Sequence[Any], part: Part, weights: Any) -> Predict:
    """Return a function that blends the predictions for a part with those of the base for its whole square.

    predict: for the tiles of the part. predictions: those of the base, in the order of the steps. weights: the soft map
    as an array or a tensor of the kind of the predictions.
    """
    steps, place, inner = iter(predictions), part.place.slices, part.inner.slices

    def blend(x: Any, t: int) -> Any:
        found = next(steps)[:, :, place[0], place[1]] * 1  # a copy
        base = found[:, :, inner[0], inner[1]]
        base += weights * (predict(x[:, :, inner[0], inner[1]], t) - base)
        return found

    return blend


class Inserted:
    """An image with a part that comes from another image."""

    def __init__(self, around: Rows, part: Rows, place: Tile) -> None:
        self.around, self.part, self.place = around, part, place
        self.height, self.width = around.height, around.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        top, left, height, width = self.place
        first, last = max(start, top), min(stop, top + height)
        band = self.around.read(start, stop)
        if first < last:
            band = band.copy()
            band[:, first - start : last - start, left : left + width] = self.part.read(first - top, last - top)
        return band
