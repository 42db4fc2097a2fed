"""The second stage of training a base on tiles: the restorer, on latents of a pool of tiles (StableSR section 3.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.config import TrainConfig, Weighting
from pfstorer_rt.files import make_folder
from pfstorer_rt.models.base import Base, fingerprint_modules
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Arrays
from pfstorer_rt.training.data import Batch, draw_timesteps
from pfstorer_rt.training.device import accelerated, to_channels_last
from pfstorer_rt.training.latents import encode_pool
from pfstorer_rt.training.loop import MakeBatch, Training, log_to, run_training, signature
from pfstorer_rt.training.objectives import RestorerObjective


@dataclass(frozen=True)
class TileRestorerConfig:
    """Settings of the restorer's training on a pool of tiles."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            iterations=4000, batch=8, learning_rate=6e-4, warmup=150, decay=0.5, ema=0.997
        )
    )
    crop: int = 24
    """Side of the latent crops of most iterations, at half of the cost of whole tiles."""
    cropped: float = 0.75
    """Share of the iterations on latent crops; the others use whole tiles."""
    first_step: float = 0.6
    """Share of the samples at timestep 999, where one-step sampling begins and ends."""
    weighting: Weighting = "x0"
    """Measure the error in the network's prediction, or in the clean latent that follows from it."""


def train_tile_restorer(
    pool: Arrays, base: Base, work: Path, config: TileRestorerConfig, on_progress: OnProgress = ignore_progress
) -> None:
    """Train UNet, structure encoder and prompt encoder of a base in place; resumes from `work/restorer.pt`.

    pool: from `tile_pool.make_pool`, with degraded versions. The autoencoder stays frozen.
    """
    make_folder(work)
    settings = config.train
    with accelerated(settings, base) as accelerator:
        to_channels_last(base.vae)
        latents = encode_pool(pool, base, work, accelerator, settings.workers, on_progress)
        training = Training(
            "restorer",
            RestorerObjective(base, config.weighting).requires_grad_(True),
            latent_sampler(latents, config),
            settings,
            work / "restorer.pt",
            signature([asdict(config), base.fingerprint, list(latents.shape)], []),
            on_log=log_to(work / "restorer.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
    base.freeze()
    base.fingerprint = fingerprint_modules(base.modules())


def latent_sampler(latents: npt.NDArray[Any], config: TileRestorerConfig) -> MakeBatch:
    """Return the function that draws batches from latents (N, versions, 2, C, h, w)."""
    settings, (tiles, versions) = config.train, latents.shape[:2]

    def make_batch(_: int, number: int) -> Batch:
        rng = np.random.default_rng([settings.seed, 23, number])
        rows = rng.integers(0, tiles, settings.batch), rng.integers(0, versions, settings.batch)
        chosen = torch.from_numpy(latents[rows]).float()
        if rng.random() < config.cropped:
            side = min(config.crop, latents.shape[-1])
            y, x = (int(n) for n in rng.integers(0, latents.shape[-1] - side + 1, 2))
            chosen = chosen[..., y : y + side, x : x + side]
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        noise = torch.randn(chosen[:, 0].shape, generator=generator)
        t = draw_timesteps(settings.batch, config.first_step, generator)
        return {"hq": chosen[:, 0], "lq": chosen[:, 1], "noise": noise, "t": t}

    return make_batch
