"""Feature wrapping for a trained base: the decoder also uses features of the LQ image (StableSR section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.diffusion import SAMPLERS, denoise_by, respace, start_from_lq
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import Base, build_cfw, fingerprint_modules
from pfstorer_rt.models.cfw import LEVELS
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.base import RESTORER
from pfstorer_rt.training.crops import CropConfig, pair_maker, split_holdout
from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.device import accelerated, to_channels_last
from pfstorer_rt.training.loop import MakeBatch, Training, log_to, run_training, signature
from pfstorer_rt.training.losses import Losses, gradient_loss

GROWTH = 16
"""Channels of a new fusion layer: more channels improve a restored tile little and enlarge a small base."""


@dataclass(frozen=True)
class WrappingConfig:
    """Settings of the stage `wrapping`."""

    train: TrainConfig = RESTORER
    crops: CropConfig = field(default_factory=CropConfig)


class WrappingObjective(nn.Module):
    """L1 + gradient L1 of the decoded image, from a restored latent and the features of the LQ image.

    StableSR trains on latents that the base restored. Here half of them are moved towards the original's latent by a
    random fraction, because a personalized denoiser restores latents closer to the original.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.cfw, self.base, self.denoiser = base.cfw, base, Denoiser(base)

    @torch.no_grad()
    def restored(self, z_lq: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Restore scaled LQ latents (B, C, h, w) with the base's default sampler and steps."""

        def predict(x: torch.Tensor, t: int) -> torch.Tensor:
            return self.denoiser(x, torch.full((len(x),), t, device=x.device), z_lq).float()

        c, schedule = self.base.config, self.base.schedule
        return SAMPLERS[c.sampler](
            denoise_by(predict, schedule, c.prediction_type),
            start_from_lq(z_lq, noise, schedule),
            respace(c.steps),
            schedule,
            lambda: torch.randn_like(noise),
            0.0,
        )

    def forward(self, batch: Batch) -> Losses:
        """Take `hq` and `lq` (B, 3, H, W) in [-1, 1], `noise` (B, C, h, w) and the original's `share` (B,)."""
        assert self.cfw is not None
        mean, _, features = self.cfw.encode(self.base.vae, batch["lq"])
        mean = mean.detach().float()
        with torch.no_grad():
            share = batch["share"][:, None, None, None]
            latent = (1 - share) * self.restored(mean, batch["noise"]) + share * self.base.encode(batch["hq"])
        output = self.cfw(self.base.vae, latent, features, 1.0).float()
        reconstruction = F.l1_loss(output, batch["hq"])
        return {"loss": reconstruction + gradient_loss(output, batch["hq"]), "l1": reconstruction}


def add_wrapping(
    sources: Sequence[Path],
    base: Base,
    out: Path,
    config: WrappingConfig,
    work: Path,
    on_progress: OnProgress = ignore_progress,
) -> Base:
    """Give a base feature wrapping, train it on photographs, and write the base to `out` in fp16.

    sources, work: as for `train_base`. Existing feature wrapping is
    trained further. Raises `BadFileError` when the autoencoder is not an AutoencoderTiny: StableSR's feature wrapping
    for other autoencoders is imported with the base.
    """
    if base.config.vae["class"] != "AutoencoderTiny":
        raise BadFileError(
            f"base {base.config.name!r}: its autoencoder is {base.config.vae['class']}; feature wrapping is trained "
            "for an AutoencoderTiny only, otherwise import it with the base"
        )
    paths, _ = split_holdout(find_images(sources), config.crops.holdout)
    make_folder(work, private=True)
    train_wrapping(paths, base, work, config, on_progress)
    base.save(out, torch.float16)
    return base


def train_wrapping(
    paths: list[Path], base: Base, work: Path, config: WrappingConfig, on_progress: OnProgress = ignore_progress
) -> None:
    """Train the fusion layers, everything else frozen; resumes from `work/wrapping.pt`."""
    settings = config.train
    if base.cfw is None:
        widths = tuple(base.config.vae["encoder_block_out_channels"][level] for level in LEVELS)
        base.config = replace(base.config, cfw={"widths": widths, "growth": GROWTH}, cfw_weight=1.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            base.cfw = build_cfw(base.config)
    assert base.cfw is not None
    with accelerated(settings, base) as accelerator:
        for module in base.modules().values():
            to_channels_last(module)
        base.cfw.requires_grad_(True)
        training = Training(
            "wrapping",
            WrappingObjective(base),
            wrapping_batches(paths, base, config),
            settings,
            work / "wrapping.pt",
            signature(["wrapping", asdict(config)], paths) + base.fingerprint,
            on_log=log_to(work / "wrapping.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
    base.freeze()
    base.fingerprint = fingerprint_modules(base.modules())


def wrapping_batches(paths: list[Path], base: Base, config: WrappingConfig) -> MakeBatch:
    """Return the function that makes the batches of `WrappingObjective` from photographs."""
    settings = config.train
    make_pair = pair_maker(paths, base.config.tile, config.crops, settings.seed, settings.batch)
    side, channels = base.config.latent_tile, base.config.latent_channels

    def make_batch(_: int, number: int) -> Batch:
        rng = np.random.default_rng([settings.seed, 7, number])
        share = rng.uniform(size=settings.batch) * (rng.random(settings.batch) < 0.5)
        noise = rng.standard_normal((settings.batch, channels, side, side), np.float32)
        return {**make_pair(number), "noise": torch.from_numpy(noise), "share": torch.from_numpy(share).float()}

    return make_batch
