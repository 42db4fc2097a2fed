"""The stages of training a base on tiles; repeating the call of a stage resumes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pfstorer_rt.config import changed
from pfstorer_rt.errors import BadFileError, MissingBackendError, SettingError
from pfstorer_rt.faces.dlib import INSTALL_METRICS, RECOGNIZER, face_models
from pfstorer_rt.models.base import Base, build_base, fingerprint_modules
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.autoencoder import AutoencoderConfig, train_patch_autoencoder
from pfstorer_rt.training.chunks import Arrays
from pfstorer_rt.training.one_step import OneStepConfig, finish_in_one_step
from pfstorer_rt.training.people import MIX, find_people, make_people_pool
from pfstorer_rt.training.prior import PriorConfig, train_prior
from pfstorer_rt.training.tile_pool import PoolConfig, make_pool, parse_source
from pfstorer_rt.training.tile_restorer import TileRestorerConfig, train_tile_restorer

TileStage = Literal["autoencoder", "restorer", "one-step", "people"]
WITH_LPIPS = ("one-step", "people")
"""Stages that compare images by LPIPS and faces by dlib's recognizer."""
VIEWS = 2
"""Tiles of each photograph in the pool of people."""


@dataclass(frozen=True)
class TileStageConfig:
    """Settings of a stage on tiles."""

    stage: TileStage
    preset: str = "portrait"
    tiles: int = 2000
    """Tiles in the pool."""
    lpips: Path | None = None
    """NPZ file of LPIPS's weights; required by `one-step` and `people`."""
    identity: bool = True
    """Whether `one-step` and `people` have an identity loss."""
    people: tuple[Path, ...] = ()
    """Folders with one folder of photographs per person; required by `people`."""
    workers: int = 1
    """Processes that compose and degrade tiles."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` that replace the stage's defaults; None keeps a default."""


def train_tile_stage(
    sources: Sequence[str],
    out: Path,
    config: TileStageConfig,
    work: Path,
    prior: Base | None = None,
    on_progress: OnProgress = ignore_progress,
    note: Callable[[str], None] = lambda _: None,
) -> Base:
    """Train one stage of a base on tiles and write the base to `out` in fp16; resumes from `work`.

    sources: `FOLDER` or `FOLDER=WEIGHT` of photographs. prior: the base from the previous stage; the first stage has
    no prior. note: called with a line if a loss is switched off. Raises `BadFileError` when the prior is missing,
    `MissingBackendError` when the network of a loss is missing, both before the tiles are made.
    """
    check_stage(config, prior, note)
    base = build_base(config.preset, config.train.get("seed") or 0) if prior is None else prior
    pool = pool_of(sources, base.config.tile, config, work / "pool", on_progress)
    if config.stage == "autoencoder":
        train_first(pool, base, work, config, on_progress)
    elif config.stage == "restorer":
        settings = TileRestorerConfig()
        settings = replace(settings, train=changed(settings.train, **config.train))
        train_tile_restorer(pool, base, work, settings, on_progress)
    elif config.stage == "one-step":
        train_last(pool, base, work, config, on_progress)
    else:
        train_with_people(pool, base, work, config, on_progress)
    base.save(out, torch.float16)
    return base


def check_stage(config: TileStageConfig, prior: Base | None, note: Callable[[str], None]) -> None:
    """Raise the errors of `train_tile_stage` for a missing prior and missing networks of losses."""
    if prior is None and config.stage != "autoencoder":
        message = f"the stage {config.stage!r} continues from a base with a trained autoencoder; give that base"
        raise BadFileError(message, setting="prior")
    if config.lpips is None and config.stage in WITH_LPIPS:
        message = f"the stage {config.stage!r} compares images by LPIPS; give the NPZ file of its weights"
        raise MissingBackendError(message, setting="lpips")
    if config.lpips is None and config.stage == "autoencoder":
        note("the autoencoder is trained without the LPIPS loss, because no file of LPIPS weights is given")
    if bool(config.people) != (config.stage == "people"):
        message = "the stage 'people' alone needs folders of people, with one folder of photographs per person"
        raise SettingError(message, setting="people")
    if config.stage in WITH_LPIPS and config.identity and face_models() is None:
        raise MissingBackendError(f"the identity loss needs dlib's recognizer; {INSTALL_METRICS}")


def pool_of(sources: Sequence[str], tile: int, config: TileStageConfig, work: Path, on_progress: OnProgress) -> Arrays:
    """Make the pool of a stage: the autoencoder needs no degraded tiles, the last stage needs faces."""
    versions = 0 if config.stage == "autoencoder" else 2
    settings = PoolConfig(
        count=config.tiles,
        tile=tile,
        versions=versions,
        faces=config.stage in WITH_LPIPS and config.identity,
        seed=config.train.get("seed") or 0,
    )
    return make_pool([parse_source(source) for source in sources], settings, work, config.workers, on_progress)


def train_first(pool: Arrays, base: Base, work: Path, config: TileStageConfig, on_progress: OnProgress) -> None:
    """Train the autoencoder and store it in the base."""
    settings = AutoencoderConfig(preset=config.preset)
    settings = replace(settings, train=changed(settings.train, **config.train))
    base.vae = train_patch_autoencoder(pool["hq"], work, settings, config.lpips, on_progress)
    base.fingerprint = fingerprint_modules(base.modules())


def train_last(pool: Arrays, base: Base, work: Path, config: TileStageConfig, on_progress: OnProgress) -> None:
    """Train the base with losses on its one-step results."""
    settings = OneStepConfig()
    settings = replace(settings, train=changed(settings.train, **config.train))
    lpips, recognizer = loss_networks(config)
    finish_in_one_step(pool, base, work, settings, lpips, recognizer, on_progress)


def train_with_people(pool: Arrays, base: Base, work: Path, config: TileStageConfig, on_progress: OnProgress) -> None:
    """Train the base and its prior on people, and on the tiles without references."""
    photos = find_people(config.people)
    count, seed = VIEWS * sum(map(len, photos)), config.train.get("seed") or 0
    views = PoolConfig(count, base.config.tile, versions=2, mix=MIX, faces=True, seed=seed)
    people = make_people_pool(photos, views, work / "people", config.workers, on_progress)
    settings = PriorConfig()
    trained = replace(settings.base, train=changed(settings.base.train, **config.train))
    lpips, recognizer = loss_networks(config)
    train_prior(people, pool, base, work, replace(settings, base=trained), lpips, recognizer, on_progress)


def loss_networks(config: TileStageConfig) -> tuple[Path, Path | None]:
    """Return the files of the LPIPS weights and of the recognizer, which is None without an identity loss."""
    folder = face_models()
    assert config.lpips is not None, "check_stage refuses this"
    return config.lpips, folder / RECOGNIZER if folder and config.identity else None
