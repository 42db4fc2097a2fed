"""Degraded crops of photographs: the samples of the stages `base`, `wrapping` and `finishing`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from pfstorer_rt.degradation.degrade import LEVELS, degrade
from pfstorer_rt.training.data import Batch, Photographs
from pfstorer_rt.training.loop import signature

PAIR_CHUNK = 64
"""Pairs that are made and written at once."""


@dataclass(frozen=True)
class CropConfig:
    """Which photographs are used, and how they are cropped and degraded."""

    zoom: float = 1.5
    """Largest magnification of a crop."""
    wide: float = 1.0
    """Largest crop, in short sides of the photograph (mirror-padded): above 1, faces become smaller."""
    variations: int = 1
    """Degraded pairs per photograph."""
    level: Literal["light", "heavy", "mixed"] = "heavy"
    """Degradation level of the pairs; `mixed` draws light or heavy for each."""
    p_hq: float = 0.03
    """Share of the pairs that are not degraded."""
    holdout: float = 0.02
    """Share of the photographs, chosen by name, that is not used for training."""


def split_holdout(paths: list[Path], share: float) -> tuple[list[Path], list[Path]]:
    """Split into (training, held out) by a hash of each file name, independently of the other files."""
    held = [p for p in paths if int(hashlib.sha256(os.fsencode(p.name)).hexdigest()[:8], 16) < share * 2**32]
    return [p for p in paths if p not in set(held)], held


def pairs_signature(paths: list[Path], tile: int, crops: CropConfig, seed: int) -> str:
    """Return a hash of the degraded crops that `pair_maker` makes."""
    return signature([crops.variations, seed, crops.zoom, crops.wide, crops.level, crops.p_hq, tile], paths)


def pair_maker(paths: list[Path], tile: int, crops: CropConfig, seed: int, size: int) -> Callable[[int], Batch]:
    """Return a function chunk number -> `hq` and `lq` images (size, 3, tile, tile) in [-1, 1]."""
    photos = Photographs(paths, seed)
    names = ("light", "heavy") if crops.level == "mixed" else (crops.level,)
    levels = [replace(LEVELS[name], p_hq=crops.p_hq) for name in names]

    def make(chunk: int) -> Batch:
        numbers = range(chunk * size, (chunk + 1) * size)
        samples = [photos.crop(k, tile, crops.zoom, crops.wide) for k in numbers]
        hq = torch.stack([image for image, _ in samples])
        lq = torch.stack([degrade(image, levels[int(rng.integers(len(levels)))], rng) for image, rng in samples])
        return {"hq": hq * 2 - 1, "lq": lq * 2 - 1}

    return make
