"""Encode, denoise, decode: a canvas of any size through an engine's sessions, tile by tile.

Encoder and decoder see a bounded neighbourhood: their tiles overlap by what they see, and only the middles are kept.
The denoiser's predictions are blended instead (mixture of diffusers; StableSR 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pfstorer_rt.engine.session import Session, out_of_memory
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging.bands import Bands
from pfstorer_rt.imaging.rows import Spool
from pfstorer_rt.runtime.layout import CodecTiles
from pfstorer_rt.tiling import Blender, Tile

Tensors = dict[str, torch.Tensor]
Done = Callable[[int], None]
"""done(n): that many tiles went through a network."""


def run(session: Session, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Run a session on tensors of any device."""
    return session.run_tensors(**{name: tensor.to(session.device) for name, tensor in tensors.items()})


def encode(session: Session, style: Bands, tiles: CodecTiles, factor: int, device: torch.device, done: Done) -> Tensors:
    """Encode a canvas to `mean` and, where the encoder has it, `std`: (1, C, h, w) each on `device`.

    The features for the decoder are given too where one tile is the canvas; else they are computed again, tile by
    tile, when they are needed: for a large picture they would be gigabytes.
    """
    if tiles.whole:
        encoded = run(session, {"image": style.read(0, style.height)})
        done(1)
        return {name: t.to(device) if name in ("mean", "std") else t for name, t in encoded.items()}
    latents: Tensors = {}
    height, width = tiles.sides
    for top, (row, below) in tiles.rows:
        band = style.read(top * factor, (top + height) * factor)
        for left, (column, right) in tiles.columns:
            image = band[..., left * factor : (left + width) * factor].contiguous()
            for name, tensor in run(session, {"image": image}).items():
                if name in ("mean", "std"):
                    if name not in latents:
                        latents[name] = torch.empty(1, tensor.shape[1], *tiles.shape, device=device)
                    kept = tensor[..., row - top : below - top, column - left : right - left]
                    latents[name][..., row:below, column:right] = kept
            done(1)
    return latents


def decode(
    session: Session,
    latent: torch.Tensor,
    features: Callable[[Tile], Tensors],
    tiles: CodecTiles,
    factor: int,
    done: Done,
) -> Spool:
    """Decode (1, C, h, w) to rows in [-1, 1]. features(tile in latent pixels): what else the decoder takes there."""
    out = Spool(tiles.shape[0] * factor, tiles.shape[1] * factor)
    height, width = tiles.sides
    for top, (row, below) in tiles.rows:
        band = np.empty(((below - row) * factor, out.width, 3), np.float32)
        for left, (column, right) in tiles.columns:
            tile = Tile(top, left, height, width)
            image = run(session, {"latent": crop(latent, tile).contiguous(), **features(tile)})["image"].cpu()
            y, x = (row - top) * factor, (column - left) * factor
            kept = image[0, :, y : y + len(band), x : x + (right - column) * factor]
            band[:, column * factor : right * factor] = kept.permute(1, 2, 0).numpy()
            done(1)
        out.write(row * factor, band)
    return out


class TiledDenoiser:
    """denoiser(x, t) of the canvas: the tiles' predictions, blended. Remembers the batch that memory allowed.

    weights: (T, T) of every tile, or None for StableSR's.
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
            except Exception as error:  # engines raise their own kinds
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
        """Halve the batch; raises `PFStorerError` where one tile is too much already."""
        if self.batch == 1:
            raise PFStorerError("too little memory for a single tile; close other programs") from error
        self.batch = min(self.batch, len(self.tiles)) // 2 or 1


def crop(array: Any, tile: Tile) -> Any:
    """Cut a tile out of the last two axes of an array or tensor."""
    rows, columns = tile.slices
    return array[..., rows, columns]
