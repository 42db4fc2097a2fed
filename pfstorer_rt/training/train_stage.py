"""The stages of training a base; repeating the call of a stage resumes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pfstorer_rt.errors import SettingError
from pfstorer_rt.files import show_path
from pfstorer_rt.models.base import Base
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.base import BaseTrainConfig, train_base
from pfstorer_rt.training.finishing import FinishingConfig, finish_base
from pfstorer_rt.training.reptile import ReptileConfig, add_prior
from pfstorer_rt.training.tile_stages import TileStageConfig, train_tile_stage
from pfstorer_rt.training.wrapping import WrappingConfig, add_wrapping

StageConfig = BaseTrainConfig | WrappingConfig | FinishingConfig | ReptileConfig | TileStageConfig
"""Settings of a stage; their type selects the stage."""


def train_stage(
    sources: Sequence[str | Path],
    out: Path,
    config: StageConfig,
    work: Path,
    prior: Base | None = None,
    on_progress: OnProgress = ignore_progress,
    note: Callable[[str], None] = lambda _: None,
) -> Base:
    """Train one stage of a base on photographs and write the base to `out` in fp16.

    `BaseTrainConfig` trains the autoencoder and the restorer, or the restorer of a prior. `WrappingConfig` trains the
    feature wrapping of a prior's decoder. `FinishingConfig` fine-tunes all of a prior except its autoencoder with
    image-space losses. `ReptileConfig` trains the prior of the personalization. `TileStageConfig` trains one stage on
    tiles.
    sources: photographs, or folders of them; for a stage on tiles also `FOLDER=WEIGHT`, for `ReptileConfig` folders of
    people. work: folder of the checkpoints. prior: the base that is trained further; it is changed in place. note:
    called with a line if a loss is switched off.
    Raises `ValueError` when a stage that needs a prior has none, and for a weight in a stage on crops.
    """
    if isinstance(config, TileStageConfig):
        return train_tile_stage([str(source) for source in sources], out, config, work, prior, on_progress, note)
    paths = [without_weight(source) for source in sources]
    if isinstance(config, BaseTrainConfig):
        return train_base(paths, out, config, work, prior, on_progress)
    if prior is None:
        stages: dict[type[StageConfig], str] = {WrappingConfig: "wrapping", FinishingConfig: "finishing"}
        stage = stages.get(type(config), "reptile")
        raise SettingError(f"stage {stage!r} needs a prior: the base that it trains further", setting="prior")
    if isinstance(config, WrappingConfig):
        return add_wrapping(paths, prior, out, config, work, on_progress)
    if isinstance(config, ReptileConfig):
        return add_prior(paths, prior, out, config, work, on_progress, note)
    return finish_base(paths, prior, out, config, work, on_progress)


def without_weight(source: str | Path) -> Path:
    """Return a source of a stage on crops; raises `ValueError` for `FOLDER=WEIGHT`."""
    path, (folder, separator, weight) = Path(source), str(source).rpartition("=")
    if separator and not path.exists() and Path(folder).exists():
        raise SettingError(
            f"{show_path(path)}: the weight {weight} belongs to the stages on tiles (autoencoder, restorer, one-step); "
            f"this stage uses every photograph equally; give {show_path(Path(folder))}"
        )
    return path
