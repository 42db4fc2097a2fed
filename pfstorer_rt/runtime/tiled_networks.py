"""The stages of a restoration: encode, denoise and decode a canvas of any size, tile by tile.

Encoder and decoder have a bounded receptive field: their tiles overlap, and the margins are discarded. The denoiser's
predictions are blended instead (mixture of diffusers; StableSR section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch

from pfstorer_rt.engine.session import Session, out_of_memory
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging.bands import as_tensor
from pfstorer_rt.imaging.rows import Rows, Spool
from pfstorer_rt.runtime.layout import CodecTiles
from pfstorer_rt.tiling import Blender, Tile

Tensors = dict[str, torch.Tensor]
Done = Callable[[int], None]
"""done(n): called after n tiles have passed through a network."""


class Codec(NamedTuple):
    """The encoder and decoder with their tiles."""

    encoder: Session
    decoder: Session
    tiles: CodecTiles
    factor: int
    """Pixels per latent pixel."""

    def images(self, style: Rows) -> Iterator[torch.Tensor]:
        """Yield the image (1, 3, H, W) of every tile, row by row from the top; each band is read once."""
        f, (height, width) = self.factor, self.tiles.sides
        for top, _ in self.tiles.rows:
            band = style.read(top * f, (top + height) * f)
            for left, _ in self.tiles.columns:
                yield as_tensor(band[..., left * f : (left + width) * f])

    def encode(self, style: Rows, device: torch.device, done: Done) -> Tensors:
        """Encode a canvas to `mean` and, with a variational encoder, `std`: (1, C, h, w) each on `device`.

        If one tile covers the canvas, the features for the decoder are returned too. For a larger canvas they would
        need gigabytes, so `features` computes them again, tile by tile.
        """
        images = self.images(style)
        if self.tiles.whole:
            encoded = run(self.encoder, {"image": next(images)})
            done(1)
            return {name: t.to(device) if name in LATENTS else t for name, t in encoded.items()}
        latents: Tensors = {}
        for top, (row, below) in self.tiles.rows:
            for left, (column, right) in self.tiles.columns:
                for name, tensor in run(self.encoder, {"image": next(images)}).items():
                    if name in LATENTS:
                        if name not in latents:
                            latents[name] = torch.empty(1, tensor.shape[1], *self.tiles.shape, device=device)
                        kept = tensor[..., row - top : below - top, column - left : right - left]
                        latents[name][..., row:below, column:right] = kept
                done(1)
        return latents

    def features(self, style: Rows, encoded: Tensors, weight: float) -> Iterator[Tensors]:
        """Yield the decoder's inputs besides the latent for every tile, in the order of `images`.

        With feature wrapping these are the features of the LQ image and their weight, otherwise none.
        """
        wanted = [name for name in self.decoder.inputs if name.startswith("features_")]
        if not wanted:
            yield from repeat({})
        kept = set(wanted) <= set(encoded)
        for found in [encoded] if kept else (run(self.encoder, {"image": image}) for image in self.images(style)):
            yield {**{name: found[name] for name in wanted}, "cfw_weight": torch.full((1,), weight)}

    def decode(self, latent: torch.Tensor, features: Iterator[Tensors], done: Done) -> Spool:
        """Decode (1, C, h, w) to a canvas."""
        f, (height, width) = self.factor, self.tiles.sides
        out = Spool(self.tiles.shape[0] * f, self.tiles.shape[1] * f)
        for top, (row, below) in self.tiles.rows:
            band = np.empty((3, (below - row) * f, out.width), np.float32)
            for left, (column, right) in self.tiles.columns:
                tile = crop(latent, Tile(top, left, height, width)).contiguous()
                image = run(self.decoder, {"latent": tile, **next(features)})["image"].cpu().numpy()
                y, x = (row - top) * f, (column - left) * f
                kept = image[0, :, y : y + (below - row) * f, x : x + (right - column) * f]
                band[..., column * f : right * f] = kept
                done(1)
            out.write(row * f, band)
        return out


LATENTS = ("mean", "std")
"""Outputs of the encoder that are latents; all others are features for the decoder."""


def run(session: Session, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Run a session on tensors from any device."""
    return session.run_tensors(**{name: tensor.to(session.device) for name, tensor in tensors.items()})


class TiledDenoiser:
    """The denoiser of a whole canvas: the blended predictions of the tiles.

    weights: blending weights (T, T) of a tile, or None for StableSR's weights. A batch that was reduced after an
    out-of-memory error stays reduced.
    """

    def __init__(self, session: Session, tiles: Sequence[Tile], weights: Any, batch: int, fixed: Tensors) -> None:
        self.session, self.tiles, self.weights, self.batch, self.fixed = session, tiles, weights, batch, fixed

    def __call__(self, x: torch.Tensor, t: int, z_lq: torch.Tensor, done: Done) -> torch.Tensor:
        """x, z_lq (1, C, h, w), t in 0..999 -> prediction (1, C, h, w)."""
        blender = Blender(x.shape[1], x.shape[2], x.shape[3], self.weights)
        start = 0
        while start < len(self.tiles):
            chosen = self.tiles[start : start + self.batch]
            stacked = {
                name: torch.stack([crop(canvas[0], tile) for tile in chosen])
                for name, canvas in (("x", x), ("z_lq", z_lq))
            }
            times = torch.full((len(chosen),), t, dtype=torch.float32, device=x.device)
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
