"""The stages of training a base; repeating the call of a stage resumes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pfstorer_rt.errors import SettingError
from pfstorer_rt.models.base import Base
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.base import BaseTrainConfig, train_base
from pfstorer_rt.training.finishing import FinishingConfig, finish_base
from pfstorer_rt.training.parts import PartConfig, train_part
from pfstorer_rt.training.wrapping import WrappingConfig, add_wrapping

StageConfig = BaseTrainConfig | WrappingConfig | FinishingConfig | PartConfig
"""Settings of a stage; their type selects the stage."""


def train_stage(
    sources: Sequence[str | Path],
    out: Path,
    config: StageConfig,
    work: Path,
    prior: Base | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Base:
    """Train one stage of a base on photographs and write the base to `out` in fp16.

    `BaseTrainConfig` trains the autoencoder and the restorer, or the restorer of a prior. `WrappingConfig` trains the
    feature wrapping of a prior's decoder. `FinishingConfig` fine-tunes all of a prior except its autoencoder with
    image-space losses. `PartConfig` trains one part on tiles.
    sources: photographs, or folders of them; for a part on tiles also `FOLDER=WEIGHT`. work: folder of the
    checkpoints. prior: the base that is trained further; it is changed in place.
    Raises `ValueError` when a stage that needs a prior has none.
    """
    if isinstance(config, PartConfig):
        return train_part([str(source) for source in sources], out, config, work, prior, on_progress)
    paths = [Path(source) for source in sources]
    if isinstance(config, BaseTrainConfig):
        return train_base(paths, out, config, work, prior, on_progress)
    if prior is None:
        stage = "wrapping" if isinstance(config, WrappingConfig) else "finishing"
        raise SettingError(f"stage {stage!r} needs a prior: the base that it trains further", setting="prior")
    if isinstance(config, WrappingConfig):
        return add_wrapping(paths, prior, out, config, work, on_progress)
    return finish_base(paths, prior, out, config, work, on_progress)
