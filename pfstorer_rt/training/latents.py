"""Latents of a pool of tiles, encoded once, for training stages that need few pixels or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from pfstorer_rt.models.base import Base, fingerprint_modules
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Arrays, Samples, make_arrays
from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.loop import signature

CHUNK = 8
"""Tiles that are encoded at once."""


def is_flipped(version: int) -> bool:
    """Whether this version of a tile and its original are flipped for training; every second version is."""
    return version % 2 == 1


def flip(pixels: npt.NDArray[np.uint8], version: int) -> npt.NDArray[np.uint8]:
    """Flip (..., H, W, 3) left to right when the version is flipped."""
    return pixels[..., ::-1, :] if is_flipped(version) else pixels


def to_pixels(tiles: npt.NDArray[np.uint8]) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(tiles)).permute(0, 3, 1, 2) / 127.5 - 1


def encode_pool(
    pool: Arrays,
    base: Base,
    work: Path,
    accelerator: Accelerator,
    workers: int = 0,
    on_progress: OnProgress = ignore_progress,
) -> npt.NDArray[Any]:
    """Encode every tile and version once; returns a memory map (N, versions, 2, C, h, w) fp16 of `hq` and `lq`.

    Versions with odd numbers are flipped (`is_flipped`).
    """
    count, versions = pool["lq"].shape[:2]
    side, channels = base.config.latent_tile, base.config.latent_channels

    def make(chunk: int) -> Batch:
        rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        pairs = [np.stack([flip(pool["hq"][rows], v), flip(pool["lq"][rows, v], v)], 1) for v in range(versions)]
        return {"pairs": torch.from_numpy(np.stack(pairs, 1))}

    def finish(chunk: Batch) -> Mapping[str, npt.NDArray[Any]]:
        pairs = chunk["pairs"]
        images = to_pixels(pairs.flatten(0, 2).numpy()).to(base.device, memory_format=torch.channels_last)
        with torch.no_grad(), accelerator.autocast():
            latents = torch.cat([base.encode(part) for part in images.split(8)])
        return {"latents": latents.float().unflatten(0, pairs.shape[:3]).half().cpu().numpy()}

    mark = signature([fingerprint_modules({"encoder": base.vae.encoder}), list(pool["lq"].shape)], [])
    items: dict[str, tuple[type, tuple[int, ...]]] = {"latents": (np.float16, (versions, 2, channels, side, side))}
    samples = Samples("latents", items, count, CHUNK, mark, make, finish, workers)
    return make_arrays(samples, work, on_progress)["latents"]
