"""Pools of people: degraded tiles of several photographs of each person, some of which serve as references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pfstorer_rt.errors import SettingError
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Arrays, make_arrays
from pfstorer_rt.training.image_loss import face_maps
from pfstorer_rt.training.loop import signature
from pfstorer_rt.training.tile_pool import PoolConfig, degrade_bytes, draw_degradation, pool_samples
from pfstorer_rt.training.tiles import Bytes

CHUNK = 8
"""Tiles that are made and written at once."""
SMALLEST, LARGEST = 0.65, 1.2
"""Range of the scale of a photograph in its tile; 1 fills the tile."""
TURNED, ANGLE = 0.3, 12.0
"""Share of the tiles that are rotated, and the standard deviation of the angle in degrees."""
MIX = (("heavy", 4.0, 0.4), ("heavy", 8.0, 0.4), ("heavy", 2.0, 0.05), ("light", 4.0, 0.1))
"""Degradations (`PoolConfig.mix`): mostly strong ones, since a reference adds little to a mild one."""


@dataclass(frozen=True)
class View:
    """One photograph of one person."""

    person: int
    photo: int
    path: Path


def find_people(folders: Sequence[Path]) -> list[list[Path]]:
    """Return the photographs of every person: each folder in `folders` has one folder for each person.

    Raises `ValueError` when a person has fewer than two photographs: one is the target, another one the reference.
    """
    people = [find_images([path]) for folder in folders for path in sorted(folder.iterdir()) if path.is_dir()]
    if not people:
        raise SettingError("no people found; expected folders that contain one folder of photographs per person")
    for photos in people:
        if len(photos) < 2:
            raise SettingError(f"{photos[0].parent}: one photograph, expected at least 2 of each person")
    return people


def make_people_pool(
    people: Sequence[Sequence[Path]],
    config: PoolConfig,
    work: Path,
    workers: int = 1,
    on_progress: OnProgress = ignore_progress,
) -> Arrays:
    """Make tiles of the photographs of people, or resume an interrupted call; returns memory maps.

    `config.count` is the number of tiles; the photographs are used in turn. Arrays as in `tile_pool.make_pool`, and
    `person`, `photo` (N,), numbers of the person and of the photograph of a tile.
    """
    make_folder(work, private=True)
    views = [View(p, i, path) for p, photos in enumerate(people) for i, path in enumerate(photos)]
    side = config.tile
    items: dict[str, tuple[type, tuple[int, ...]]] = {
        "hq": (np.uint8, (side, side, 3)),
        "lq": (np.uint8, (config.versions, side, side, 3)),
        "maps": (np.float32, (2, 3)),
        "person": (np.int32, ()),
        "photo": (np.int32, ()),
    }

    mark = signature([asdict(config), [view.person for view in views]], [view.path for view in views])
    samples = pool_samples(items, config.count, CHUNK, mark, partial(make_view, views, config), workers)
    return make_arrays(samples, work, on_progress)


def make_view(views: Sequence[View], config: PoolConfig, number: int) -> dict[str, npt.NDArray[Any]]:
    """Make tile `number` with its degraded versions; a pure function of (seed, number)."""
    view, rng = views[number % len(views)], np.random.default_rng([config.seed, 31, number])
    with Image.open(view.path) as file:
        tile = place(file.convert("RGB"), config.tile, rng)
    versions = [degrade_bytes(tile, draw_degradation(config, rng), rng) for _ in range(config.versions)]
    return {
        "hq": tile,
        "lq": np.stack(versions),
        "maps": face_maps([tile / np.float32(255)])[0],
        "person": np.array(view.person, np.int32),
        "photo": np.array(view.photo, np.int32),
    }


def place(image: Image.Image, size: int, rng: np.random.Generator) -> Bytes:
    """Put a photograph at random scale, angle and position into a tile, with mirrored surroundings."""
    scale = size / min(image.size) * float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
    angle = float(rng.normal(0, ANGLE)) if rng.random() < TURNED else 0.0
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    border = size // 2
    padded = Image.fromarray(np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), mode="symmetric"))
    if angle:
        padded = padded.rotate(angle, Image.Resampling.BICUBIC)
    free = [(n - size) / 2 for n in (padded.height, padded.width)]
    reach = [abs(n - size) / 2 for n in (image.height, image.width)]
    top, left = (round(f + rng.uniform(-r, r)) for f, r in zip(free, reach, strict=True))
    return np.asarray(padded.crop((left, top, left + size, top + size)))
