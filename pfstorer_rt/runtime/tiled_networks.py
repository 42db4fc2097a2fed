"""The stages of a restoration: encode, denoise and decode a canvas of any size, tile by tile.

Encoder and decoder have a bounded receptive field: their tiles overlap, and the margins are discarded. The denoiser's
predictions are blended instead (mixture of diffusers; StableSR section 3.4).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pfstorer_rt.arrays import Array, stack
from pfstorer_rt.engine.session import Session, out_of_memory
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging.rows import Band, Rows, Spool, read_ahead
from pfstorer_rt.runtime.layout import CodecTiles
from pfstorer_rt.tiling import Blender, Tile, Weights

Latent = npt.NDArray[np.float32]
"""(1, C, h, w)."""
Arrays = dict[str, Array]
Done = Callable[[int], None]
"""done(n): called after n tiles have passed through a network."""

KEPT = 384 << 20
"""Largest size in bytes of the features that are kept for the decoder. Computing them again costs an encoder's pass."""


def are_kept(tiles: CodecTiles, size: float) -> bool:
    """Whether the features of all tiles, of `size` bytes, are kept for the decoder: those of one tile always are."""
    return tiles.whole or size <= KEPT


def wanted_features(decoder: Session) -> list[str]:
    """Return the names of the features that a decoder reads; empty without feature wrapping."""
    return [name for name in decoder.inputs if name.startswith("features_")]


class Encoded:
    """An encoded canvas: `latents`, its `mean` and, of a variational encoder, `std`, as numpy arrays (1, C, h, w)."""

    def __init__(self, latents: dict[str, Latent], tiles: CodecTiles, features: deque[Arrays]) -> None:
        """features: those of every tile for the decoder, as arrays of the encoder; empty if they were not kept."""
        self.latents, self._tiles, self._features = latents, tiles, features

    def release(self, tiles: CodecTiles) -> Iterator[Arrays] | None:
        """Return the kept features of `tiles`, each freed after its use; None if there are none."""
        if tiles is not self._tiles:
            self._features.clear()
        kept = self._features
        return (kept.popleft() for _ in range(len(kept))) if kept else None


class Codec(NamedTuple):
    """The encoder and decoder with their tiles."""

    encoder: Session
    decoder: Session
    tiles: CodecTiles
    factor: int
    """Pixels per latent pixel."""

    def images(self, style: Rows) -> Iterator[Band]:
        """Yield the image (1, 3, H, W) of every tile, row by row from the top; each band is read once."""
        f, (height, width) = self.factor, self.tiles.sides
        spans = [(top * f, (top + height) * f) for top, _ in self.tiles.rows]
        for band in read_ahead(style.read, spans, 1):  # the host prepares the next band while the networks run
            for left, _ in self.tiles.columns:
                yield band[None, ..., left * f : (left + width) * f]

    def encode(self, style: Rows, done: Done) -> Encoded:
        """Encode a canvas; keeps the features of all tiles for the decoder, if they are not too large."""
        latents: dict[str, Latent] = {}
        features, wanted, images = deque[Arrays](), wanted_features(self.decoder), self.images(style)
        for top, (row, below) in self.tiles.rows:
            for left, (column, right) in self.tiles.columns:
                found = run(self.encoder, {"image": next(images)})
                for name in LATENTS & found.keys():
                    tile = self.encoder.fetch(found.pop(name))
                    latents.setdefault(name, np.empty((1, tile.shape[1], *self.tiles.shape), np.float32))
                    kept = tile[..., row - top : below - top, column - left : right - left]
                    latents[name][..., row:below, column:right] = kept
                if are_kept(self.tiles, len(self.tiles) * sum(found[name].nbytes for name in wanted)):
                    features.append({name: found[name] for name in wanted})
                done(1)
        return Encoded(latents, self.tiles, features)

    def features(self, style: Rows, encoded: Encoded, weight: float) -> Iterator[Arrays]:
        """Yield the decoder's inputs besides the latent for every tile, in the order of `images`.

        With feature wrapping these are the features of the LQ image and their weight, otherwise none. Features that
        were not kept, or belong to other tiles, are computed again. Kept features are freed after their use.
        """
        wanted = wanted_features(self.decoder)
        if not wanted:
            yield from repeat({})
        again = (run(self.encoder, {"image": image}) for image in self.images(style))
        for found in encoded.release(self.tiles) or again:
            yield {**{name: found[name] for name in wanted}, "cfw_weight": np.full(1, weight, np.float32)}

    def decode(self, latent: Latent, features: Iterator[Arrays], done: Done) -> Spool:
        """Decode a latent to a canvas."""
        f, (height, width) = self.factor, self.tiles.sides
        out = Spool(self.tiles.shape[0] * f, self.tiles.shape[1] * f)
        for top, (row, below) in self.tiles.rows:
            band = np.empty((3, (below - row) * f, out.width), np.float32)
            for left, (column, right) in self.tiles.columns:
                tile = crop(latent, Tile(top, left, height, width))
                image = self.decoder.fetch(run(self.decoder, {"latent": tile, **next(features)})["image"])
                y, x = (row - top) * f, (column - left) * f
                kept = image[0, :, y : y + (below - row) * f, x : x + (right - column) * f]
                band[..., column * f : right * f] = kept
                done(1)
            out.write(row * f, band)
        return out


LATENTS = {"mean", "std"}
"""Outputs of the encoder that are latents; all others are features for the decoder."""


def run(session: Session, arrays: Mapping[str, Array]) -> Arrays:
    """Run a session on arrays of any kind; the outputs have the kind of the engine."""
    return session.compute(**{name: session.place(array) for name, array in arrays.items()})


class TiledDenoiser:
    """The denoiser of a whole canvas: the blended predictions of the tiles.

    weights: blending weights (T, T) of a tile, or None for StableSR's weights. fixed: inputs that are the same for all
    tiles. A batch that was reduced after an out-of-memory error stays reduced.
    """

    def __init__(
        self, session: Session, tiles: Sequence[Tile], weights: Weights | None, batch: int, fixed: Arrays
    ) -> None:
        self.session, self.tiles, self.weights, self.batch, self.fixed = session, tiles, weights, batch, fixed

    def __call__(self, x: Array, t: int, z_lq: Array, done: Done) -> Array:
        """x, z_lq (1, C, h, w), t in 0..999 -> prediction (1, C, h, w), all arrays of the engine's kind."""
        blender = Blender(x.shape[1], x.shape[2], x.shape[3], self.weights)
        start = 0
        while start < len(self.tiles):
            chosen = self.tiles[start : start + self.batch]
            stacked = {
                name: stack([crop(canvas[0], tile) for tile in chosen]) for name, canvas in (("x", x), ("z_lq", z_lq))
            }
            times = np.full(len(chosen), t, np.float32)
            try:
                predictions = run(self.session, {**stacked, "t": times, **self.fixed})["prediction"]
            except Exception as error:  # every engine has its own error types
                if not out_of_memory(error):
                    raise
                self.shrink(error)
                continue
            for tile, prediction in zip(chosen, predictions, strict=True):
                blender.add(tile, prediction)
            start += len(chosen)
            done(len(chosen))
        return blender.result()[None]

    def shrink(self, error: Exception) -> None:
        """Halve the batch; raises `PFStorerError` when the batch is already one tile."""
        if self.batch == 1:
            raise PFStorerError("too little memory for a single tile; close other programs") from error
        self.batch = min(self.batch, len(self.tiles)) // 2 or 1


def crop(array: Any, tile: Tile) -> Any:
    """Crop the last two axes of an array or tensor to a tile."""
    rows, columns = tile.slices
    return array[..., rows, columns]
