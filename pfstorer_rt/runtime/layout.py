"""The layout: the division of an image into tiles, computed once before a restoration.

An image is enlarged and padded to a canvas. A canvas is one square, or several in parity mode above 1280 pixels.
Every square is divided into tiles of the denoiser, which are blended, and into tiles of the encoder and decoder, whose
margins are discarded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pfstorer_rt.imaging.bands import Canvas, plan_canvas
from pfstorer_rt.imaging.rows import spooled_bytes
from pfstorer_rt.plan import Manifest
from pfstorer_rt.runtime.recipe import Recipe
from pfstorer_rt.tiling import Tile, axis_offsets, even_offsets, kept_spans, plan_tiles


class CodecSize(NamedTuple):
    """Largest tile of an encoder and decoder, and the margin around it that is discarded, in pixels."""

    tile: int
    margin: int


TINY_CODEC = CodecSize(512, 32)
"""For convolutional autoencoders. The margin is about half of the receptive field, whose border has little weight."""
VARIATIONAL_CODEC = CodecSize(1280, 128)
"""For variational autoencoders, whose norms depend on the whole tile."""

SMALLEST_CODEC = 4
"""Smallest side of a tile of the encoder and decoder, in latent pixels."""


class CodecTiles:
    """Tiles of the encoder and decoder with their discarded margins; the unit is latent pixels."""

    def __init__(self, height: int, width: int, tile: int, margin: int) -> None:
        self.shape, self.tile, self.margin = (height, width), tile, margin
        self.sides = min(tile, height), min(tile, width)
        spans = []
        for length, side in zip(self.shape, self.sides, strict=True):
            offsets = even_offsets(length, side, min(2 * margin, side - 1))
            spans.append(list(zip(offsets, kept_spans(offsets, side), strict=True)))
        self.rows, self.columns = spans
        """(offset, (first, end) of the kept part) of every row and column of tiles."""

    @property
    def whole(self) -> bool:
        """Whether one tile covers everything."""
        return len(self) == 1

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def halved(self) -> CodecTiles | None:
        """Return tiles of half the side, with a margin of at most a quarter of it; None below `SMALLEST_CODEC`."""
        tile = max(self.sides) // 2
        return None if tile < SMALLEST_CODEC else CodecTiles(*self.shape, tile, min(self.margin, tile // 4))


@dataclass(frozen=True)
class Layout:
    """Canvas, squares and tiles of one image, with the recipe that they were computed for."""

    recipe: Recipe
    canvas: Canvas
    squares: tuple[Tile, ...]
    """Parts of the canvas, all of one size, in pixels; they are restored in sequence."""
    tiles: tuple[Tile, ...]
    """Tiles of the denoiser in every square, in latent pixels."""
    codec: CodecTiles
    """Tiles of the encoder and decoder in every square, in latent pixels."""

    @classmethod
    def of(cls, height: int, width: int, recipe: Recipe, manifest: Manifest, variational: bool) -> Layout:
        """Compute the layout of an image of height x width pixels.

        variational: whether the encoder is variational, so that its norms need large tiles.
        """
        canvas, factor = plan_canvas(height, width, manifest.tile, recipe.scale), manifest.factor
        fast = recipe.mode == "fast"
        squares = (Tile(0, 0, *canvas.padded),) if fast else chop_squares(*canvas.padded, recipe)
        h, w = squares[0].height, squares[0].width
        tiles = plan_tiles(h // factor, w // factor, manifest.tile // factor, recipe.overlap // factor, even=fast)
        size = VARIATIONAL_CODEC if variational else TINY_CODEC
        side = max(size.tile if fast else max(h, w), manifest.tile)
        codec = CodecTiles(h // factor, w // factor, side // factor, size.margin // factor)
        return cls(recipe, canvas, squares, tuple(tiles), codec)

    @property
    def denoiser_tiles(self) -> int:
        """Tiles of the denoiser in one step, over all squares."""
        return len(self.squares) * len(self.tiles)

    @property
    def codec_tiles(self) -> int:
        """Tiles of the encoder, and as many of the decoder, over all squares."""
        return len(self.squares) * len(self.codec)

    @property
    def batch(self) -> int:
        """Tiles that pass through the denoiser at once."""
        return min(len(self.tiles), self.recipe.batch)

    @property
    def total(self) -> int:
        """Tiles through all networks and steps."""
        return self.denoiser_tiles * self.recipe.steps + 2 * self.codec_tiles

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the temporary files: a decoded square, and the canvas of several squares."""
        canvas = spooled_bytes(*self.canvas.padded) if len(self.squares) > 1 else 0
        return spooled_bytes(self.squares[0].height, self.squares[0].width) + canvas

    def facts(self) -> dict[str, Any]:
        """Return the entries of a report: sizes in pixels and numbers of tiles."""
        height, width = self.canvas.padded
        return {
            "height": height,
            "width": width,
            "tiles": self.denoiser_tiles,
            "codec_tiles": self.codec_tiles,
            "steps": self.recipe.steps,
            "batch": self.batch,
            "squares": len(self.squares),
        }


def chop_squares(height: int, width: int, recipe: Recipe) -> tuple[Tile, ...]:
    """Divide a canvas into StableSR's squares; a canvas up to the size of one square is a single square."""
    sides = min(height, recipe.chop), min(width, recipe.chop)
    rows, columns = (chop_offsets(n, side, recipe.chop_stride) for n, side in zip((height, width), sides, strict=True))
    return tuple(Tile(y, x, *sides) for y in rows for x in columns)


def chop_offsets(length: int, side: int, stride: int) -> list[int]:
    """Return the offsets of StableSR's squares along an axis (StableSR's tiled inference script)."""
    return axis_offsets(length, side, max(0, side - stride))
