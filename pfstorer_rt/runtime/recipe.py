"""The recipe: the settings of a restoration, checked, with every default filled in from the engine's manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.diffusion import check_sampler, respace
from pfstorer_rt.errors import SettingError
from pfstorer_rt.imaging.bands import PADDING, check_scale
from pfstorer_rt.plan import Manifest

OVERLAP = {"parity": 2, "fast": 4}
"""Default overlap of neighbouring tiles: 1/n of a tile."""
LARGEST_WEIGHT = 10.0
"""Largest absolute value of `strength` and `cfw_weight`; larger values only overflow."""
EXPECTED = f"expected -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"


@dataclass(frozen=True)
class Recipe:
    """Settings of one restoration, all resolved; the fields have the meaning of `RestoreConfig` and `TileConfig`."""

    steps: int
    sampler: str
    seed: int
    strength: float
    scale: float
    cfw_weight: float
    color_fix: Literal["auto", "adain", "wavelet", "none"]
    coarse: Literal["auto", "on", "off"]
    init: Literal["lq", "noise"]
    eta: float
    mode: Literal["fast", "parity"]
    overlap: int
    """Pixels shared by neighbouring tiles."""
    batch: int
    chop: int
    """Side of a square in parity mode, in pixels; at least one tile."""
    chop_stride: int
    colorize: bool

    @classmethod
    def resolve(cls, config: RestoreConfig, manifest: Manifest, tile_batch: int = 4) -> Recipe:
        """Fill in the defaults of an engine; raises `ValueError` for a setting that does not fit the engine.

        tile_batch: the engine's number of tiles in one batch.
        """
        recipe = cls(
            steps=manifest.steps if config.steps is None else config.steps,
            sampler=config.sampler or manifest.sampler,
            seed=config.seed,
            strength=config.strength,
            scale=config.scale,
            cfw_weight=manifest.cfw_weight if config.cfw_weight is None else config.cfw_weight,
            color_fix=config.color_fix,
            coarse=config.coarse,
            init=config.init,
            eta=config.eta,
            mode=config.tile.mode,
            overlap=_default_overlap(config, manifest) if config.tile.overlap is None else config.tile.overlap,
            batch=tile_batch if config.tile.batch is None else config.tile.batch,
            chop=max(config.tile.chop, manifest.tile),
            chop_stride=config.tile.chop_stride,
            colorize=config.colorize,
        )
        _check_diffusion(recipe)
        _check_networks(recipe, manifest)
        _check_tiles(config, recipe, manifest)
        return recipe


def _default_overlap(config: RestoreConfig, manifest: Manifest) -> int:
    return manifest.tile // manifest.factor // OVERLAP[config.tile.mode] * manifest.factor


def _check_diffusion(recipe: Recipe) -> None:
    respace(recipe.steps)
    check_scale(recipe.scale)
    check_sampler(recipe.sampler)
    if not 0 <= recipe.eta <= 1:
        raise SettingError(f"eta {recipe.eta}: expected 0 to 1", setting="eta")


def check_strength(strength: float) -> None:
    """Raise `SettingError` for a strength out of range."""
    if not abs(strength) <= LARGEST_WEIGHT:
        message = f"strength {strength}: {EXPECTED}; 0 is the base, 1 is as trained"
        raise SettingError(message, setting="strength")


def _check_networks(recipe: Recipe, manifest: Manifest) -> None:
    strength, weight = recipe.strength, recipe.cfw_weight
    check_strength(strength)
    if strength != 1.0 and not manifest.strength and manifest.identity_name:
        raise SettingError(
            f"strength {strength}: the identity of this engine has no gated blocks to scale; set strength to 1",
            setting="strength",
        )
    if not abs(weight) <= LARGEST_WEIGHT:
        raise SettingError(f"cfw_weight {weight}: {EXPECTED}; 0 is the plain decoder", setting="cfw_weight")
    if weight and not manifest.cfw:
        raise SettingError(
            f"cfw_weight {weight}: this engine has no controllable feature wrapping; set cfw_weight to 0, or import "
            "the base with its feature wrapping and export it again",
            setting="cfw_weight",
        )


def _check_tiles(config: RestoreConfig, recipe: Recipe, manifest: Manifest) -> None:
    if not 0 <= recipe.overlap < manifest.tile or recipe.overlap % manifest.factor:
        raise SettingError(
            f"overlap {recipe.overlap}: expected 0 to {manifest.tile - manifest.factor} in steps of "
            f"{manifest.factor} pixels",
            setting="overlap",
        )
    if recipe.batch < 1:
        raise SettingError(f"tile batch {recipe.batch}: expected at least 1")
    if config.tile.chop < 1 or config.tile.chop % PADDING:
        raise SettingError(f"chop {config.tile.chop}: expected a multiple of {PADDING} pixels")
    if recipe.chop_stride < 1:
        raise SettingError(f"chop_stride {recipe.chop_stride}: expected at least 1 pixel")
