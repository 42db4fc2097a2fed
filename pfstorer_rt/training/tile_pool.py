"""Pools of training tiles: worker processes compose and degrade them once; they are stored as uint8 memory maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.degradation.degrade import LEVELS, DegradationConfig, degrade
from pfstorer_rt.errors import SettingError
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Arrays, Samples, make_arrays
from pfstorer_rt.training.color_jitter import draw_jitter
from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.image_loss import face_maps
from pfstorer_rt.training.loop import signature
from pfstorer_rt.training.tiles import Bytes, Source, TileComposer

CHUNK = 16
"""Tiles that are made and written at once."""


@dataclass(frozen=True)
class PoolConfig:
    """Settings of a pool."""

    count: int = 2000
    """Number of tiles."""
    tile: int = 512
    """Side of a tile in pixels."""
    versions: int = 0
    """Degraded versions of each tile."""
    mix: tuple[tuple[str, float, float], ...] = (
        ("heavy", 4.0, 0.35),
        ("heavy", 8.0, 0.2),
        ("heavy", 12.0, 0.1),
        ("light", 4.0, 0.1),
        ("heavy", 2.0, 0.08),
        ("light", 2.0, 0.04),
        ("light", 1.0, 0.04),
    )
    """Level, its `sf`, and its share of the versions; the remaining versions are not degraded."""
    jitter: float = 0.5
    """Share of the tiles whose colours, contrast and brightness are changed at random."""
    faces: bool = False
    """Find the faces of the tiles, for the identity loss."""
    seed: int = 0


def parse_source(text: str) -> Source:
    """Read `FOLDER` or `FOLDER=WEIGHT`; raises `ValueError` for a weight that is not above 0."""
    name, separator, weight = text.rpartition("=")
    if not separator:
        return Source(find_images([Path(text)]), 1.0)
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise SettingError(f"weight {weight!r} of {name}: expected a number above 0")
    return Source(find_images([Path(name)]), value)


def make_pool(
    sources: Sequence[Source],
    config: PoolConfig,
    work: Path,
    workers: int = 1,
    on_progress: OnProgress = ignore_progress,
) -> Arrays:
    """Make a pool once, or resume an interrupted one; returns its memory maps.

    `hq` (N, S, S, 3) and `lq` (N, versions, S, S, 3) are uint8. `maps` (N, 2, 3) are the positions of each tile's
    largest face (`face_map`), NaN without a face.
    """
    make_folder(work, private=True)
    composer, side = TileComposer(sources, config.tile, config.seed), config.tile
    items: dict[str, tuple[type, tuple[int, ...]]] = {"hq": (np.uint8, (side, side, 3)), "maps": (np.float32, (2, 3))}
    if config.versions:
        items["lq"] = (np.uint8, (config.versions, side, side, 3))

    paths = [path for source in sources for path in source.paths]
    mark = signature([asdict(config), [(len(s.paths), s.weight) for s in sources]], paths)
    samples = pool_samples(items, config.count, CHUNK, mark, partial(make_tile, composer, config), workers)
    return make_arrays(samples, work, on_progress)


def pool_samples(
    items: Mapping[str, tuple[type, tuple[int, ...]]],
    count: int,
    size: int,
    mark: str,
    make_one: Callable[[int], dict[str, npt.NDArray[Any]]],
    workers: int,
) -> Samples:
    """Describe a pool of `count` samples, made in chunks of `size`; make_one: number of a sample -> its arrays."""

    def make(chunk: int) -> Batch:
        samples = [make_one(k) for k in range(chunk * size, (chunk + 1) * size)]
        return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in items}

    def finish(chunk: Batch) -> Mapping[str, npt.NDArray[Any]]:
        return {name: tensor.numpy() for name, tensor in chunk.items()}

    return Samples("pool", items, count, size, mark, make, finish, workers)


def make_tile(composer: TileComposer, config: PoolConfig, number: int) -> dict[str, npt.NDArray[Any]]:
    """Make tile `number` with its degraded versions, and find its face if `config.faces`."""
    tile, rng = composer(number)
    made: dict[str, npt.NDArray[Any]] = {"hq": tile, "maps": np.full((2, 3), np.nan, np.float32)}
    if config.faces:
        made["maps"] = face_maps([tile / np.float32(255)])[0]
    if config.jitter:
        jitter = draw_jitter(1, config.jitter, rng)
        made["hq"] = tile = to_bytes(jitter.apply(to_image(tile)[None])[0])
    if config.versions:
        made["lq"] = np.stack([degrade_bytes(tile, draw_degradation(config, rng), rng) for _ in range(config.versions)])
    return made


def draw_degradation(config: PoolConfig, rng: np.random.Generator) -> DegradationConfig | None:
    """Draw the degradation of a version; None leaves it undegraded."""
    shares = [share for *_, share in config.mix]
    k = int(rng.choice(len(shares) + 1, p=[*shares, 1 - sum(shares)]))
    if k == len(shares):
        return None
    name, factor, _ = config.mix[k]
    return replace(LEVELS[name], sf=factor)


def degrade_bytes(tile: Bytes, config: DegradationConfig | None, rng: np.random.Generator) -> Bytes:
    """Degrade (H, W, 3) uint8; config None returns a tile unchanged."""
    return tile if config is None else to_bytes(degrade(to_image(tile), config, rng))


def to_image(tile: Bytes) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [0, 1]."""
    return (torch.from_numpy(tile.copy()).permute(2, 0, 1).float() / 255).contiguous()


def to_bytes(image: torch.Tensor) -> Bytes:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    made: Bytes = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    return made
