"""The stages of training a base on photographs; repeating the call of a stage resumes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pfstorer_rt.errors import SettingError
from pfstorer_rt.models.base import Base
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.base import BaseTrainConfig, train_base
from pfstorer_rt.training.finishing import finish_base
from pfstorer_rt.training.wrapping import add_wrapping

Stage = Literal["restorer", "wrapping", "finishing"]


def train_stage(
    stage: Stage,
    sources: Sequence[Path],
    out: Path,
    config: BaseTrainConfig,
    work: Path,
    prior: Base | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Base:
    """Train one stage of a base on photographs and write the base to `out` in fp16.

    stage: `restorer` trains the autoencoder and the restorer, or the weights of `config.trained` on a prior;
    `wrapping` trains the prior's decoder feature wrapping alone; `finishing` fine-tunes all of the prior except its
    autoencoder with image-space losses. The other arguments are the same as for `train_base`.
    Raises `ValueError` for an unknown stage, and when a stage that needs a prior has none.
    """
    if stage == "restorer":
        return train_base(sources, out, config, work, prior, on_progress)
    stages = {"wrapping": add_wrapping, "finishing": finish_base}
    if stage not in stages:
        raise SettingError(f"stage {stage!r}: expected restorer, wrapping or finishing")
    if prior is None:
        raise SettingError(f"stage {stage!r} needs a prior: the base that it trains further", setting="prior")
    return stages[stage](sources, prior, out, config, work, on_progress)
