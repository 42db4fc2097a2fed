"""The first stage of training a base on tiles: the autoencoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.config import PRESETS, TrainConfig
from pfstorer_rt.files import make_folder
from pfstorer_rt.models.vae import Autoencoder, build_vae, decode, encode_moments
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.loop import Training, log_to, run_training, signature
from pfstorer_rt.training.losses import Losses, gradient_loss, moment_loss
from pfstorer_rt.training.lpips import Lpips


@dataclass(frozen=True)
class AutoencoderConfig:
    """Settings of the autoencoder's training on a pool of tiles."""

    preset: str = "portrait"
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            iterations=5000, batch=8, learning_rate=6e-4, warmup=200, decay=0.6, ema=0.998, weight_decay=0.0
        )
    )
    crop: int = 256
    """Side in pixels of the random crops of the tiles."""
    noise: float = 0.05
    """Standard deviation of the noise that is added to the latent, so that the decoder becomes robust to it."""
    moments: float = 0.02
    """Weight of the moment loss, which keeps the latent at mean 0 and standard deviation 1."""
    lambda_perceptual: float = 0.2
    """Weight of LPIPS."""
    patch: int = 128
    """Side in pixels of the crops for LPIPS."""
    patches: int = 1
    """Samples of a batch for LPIPS, whose network costs more than the autoencoder."""


class PatchAutoencoderObjective(nn.Module):
    """Reconstruction through a noisy latent: L1 + gradient L1 + unit moments + LPIPS of small crops."""

    def __init__(self, vae: Autoencoder, config: AutoencoderConfig, perceptual: Lpips | None = None) -> None:
        super().__init__()
        self.vae, self.config, self.perceptual = vae, config, perceptual

    def forward(self, batch: Batch) -> Losses:
        """Take `image` (B, 3, H, W) in [-1, 1] and `noise` (B, C, h, w)."""
        c = self.config
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        latent, _ = encode_moments(self.vae, image)
        output = decode(self.vae, latent + c.noise * batch["noise"]).float()
        reconstruction, moments = F.l1_loss(output, image), moment_loss(latent.float())
        loss = reconstruction + gradient_loss(output, image) + c.moments * moments
        losses = {"l1": reconstruction, "moments": moments, "psnr": decibels(output.detach(), image)}
        if self.perceptual is not None:
            rows = (slice(0, c.patches), slice(None), slice(0, c.patch), slice(0, c.patch))
            losses["perceptual"] = self.perceptual(output[rows], image[rows]).mean()
            loss = loss + c.lambda_perceptual * losses["perceptual"]
        return {"loss": loss, **losses}


def decibels(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of (B, 3, H, W) in [-1, 1], over the whole batch."""
    return -10 * torch.log10(F.mse_loss(output, target) / 4)


def train_patch_autoencoder(
    pool: npt.NDArray[np.uint8],
    work: Path,
    config: AutoencoderConfig,
    lpips: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Autoencoder:
    """Train the preset's autoencoder on tiles (N, S, S, 3); resumes from `work/autoencoder.pt`.

    lpips: weights of LPIPS; None trains without it.
    """
    make_folder(work)
    settings, preset = config.train, PRESETS[config.preset]
    crop = min(config.crop, pool.shape[1])
    side = crop // preset.factor

    def make_batch(_: int, number: int) -> Batch:
        rng = np.random.default_rng([settings.seed, 19, number])
        noise = rng.standard_normal((settings.batch, preset.latent_channels, side, side), np.float32)
        squares = np.stack([cut(pool[int(rng.integers(len(pool)))], crop, rng) for _ in range(settings.batch)])
        image = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"image": image, "noise": torch.from_numpy(noise)}

    with accelerated(settings) as accelerator:
        vae = build_vae(preset.vae)
        training = Training(
            "autoencoder",
            PatchAutoencoderObjective(vae, config, Lpips(lpips) if lpips else None),
            make_batch,
            settings,
            work / "autoencoder.pt",
            signature([asdict(config), str(lpips is not None), pool.shape], []),
            [{"params": list(vae.parameters())}],
            on_log=log_to(work / "autoencoder.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
    return vae.eval().requires_grad_(False)


def cut(tile: npt.NDArray[np.uint8], side: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Crop (H, W, 3) to a random square; half of the crops are flipped."""
    top, left = (int(rng.integers(0, n - side + 1)) for n in tile.shape[:2])
    square = tile[top : top + side, left : left + side]
    return square[:, ::-1] if rng.random() < 0.5 else square
