"""The last stage of training a base: fine-tuning with losses on the latent and on the decoded image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.diffusion import LAST, noisy_latent, x0_from_prediction
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.files import from_tensor
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import Base
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.base import RESTORER
from pfstorer_rt.training.chunks import Samples, make_arrays
from pfstorer_rt.training.crops import PAIR_CHUNK, CropConfig, pair_maker, pairs_signature, split_holdout
from pfstorer_rt.training.data import Batch, draw_timesteps
from pfstorer_rt.training.device import accelerated, to_channels_last
from pfstorer_rt.training.image_loss import ImageSpaceLoss, draw_views, face_maps
from pfstorer_rt.training.loop import MakeBatch, Training, log_to, run_training, signature
from pfstorer_rt.training.losses import Losses
from pfstorer_rt.training.objectives import RestorerObjective


@dataclass(frozen=True)
class FinishingConfig:
    """Settings of the stage `finishing`."""

    train: TrainConfig = RESTORER
    crops: CropConfig = field(default_factory=CropConfig)
    first_step: float = 0.0
    """Share of the samples at timestep 999, where sampling starts; only these have losses on the decoded image."""
    lambda_pixel: float = 0.5
    """Weight of the decoded image's error."""
    lambda_color: float = 0.0
    """Weight of the decoded image's error, averaged over squares."""
    lambda_perceptual: float = 0.2
    """Weight of ST-LPIPS."""
    lambda_id: float = 0.3
    """Weight of the identity loss."""
    lambda_face: float = 0.0
    """Weight of the distance between the recognizer's feature maps."""
    share: float = 0.5
    """Interpolation between the prior's weights (0) and the trained weights (1)."""


class FinishingObjective(RestorerObjective):
    """L_x0, the squared error of the clean latent at every timestep, and `ImageSpaceLoss` at timestep 999.

    Samples at timestep 999 start from the LQ latent, as in a restoration. UNet, structure encoder, prompt encoder and
    feature wrapping are trained; the autoencoder stays frozen.
    """

    def __init__(self, base: Base, config: FinishingConfig) -> None:
        super().__init__(base, "x0")
        self.base, self.cfw, self.image_loss = base, base.cfw, ImageSpaceLoss(base, config)

    def forward(self, batch: Batch) -> Losses:
        """Take `hq` and `lq` (B, 3, H, W) in [-1, 1], `noise` (B, C, h, w), `t` (B,), `maps` (B, 2, 3), `corner` (2,).

        `maps` and `corner` are arguments of `ImageSpaceLoss`.
        """
        hq, lq, noise, t = batch["hq"], batch["lq"], batch["noise"], batch["t"]
        with torch.no_grad():
            x0 = self.base.encode(hq).float()
        assert self.cfw is not None
        z_lq, _, features = self.cfw.encode(self.base.vae, lq)
        z_lq, first = z_lq.detach().float(), t == LAST
        x = noisy_latent(x0, z_lq, noise, t, self.alphas_cumprod)
        context = self.text_encoder(self.ids).expand(len(x), -1, -1)
        prediction = self.unet(x, t, context, self.structure_encoder(z_lq, t)).float()
        restored = x0_from_prediction(x, prediction, t, self.alphas_cumprod, self.prediction_type)
        diff = F.mse_loss(restored, x0)
        seen = self.image_loss(
            restored[first],
            {level: f[first] for level, f in features.items()},
            hq[first],
            batch["maps"][first],
            batch["corner"],
        )
        return {"loss": diff + seen.pop("image"), "diff": diff, **seen}


def finish_base(
    sources: Sequence[Path],
    base: Base,
    out: Path,
    config: FinishingConfig,
    work: Path,
    on_progress: OnProgress = ignore_progress,
) -> Base:
    """Fine-tune all of a base except its autoencoder with image-space losses, and write it to `out` in fp16.

    The result's weights are interpolated by `config.share` between the prior's (0) and the trained weights (1)
    (WiSE-FT, Wortsman 2022, section 3). Share 1 gives sharper images with ragged eyes.

    sources, work: as for `train_base`. Raises `BadFileError` for a base without feature wrapping,
    `MissingBackendError` without the `metrics` extra.
    """
    if base.cfw is None:
        raise BadFileError(f"base {base.config.name!r} has no feature wrapping; train it first")
    paths, _ = split_holdout(find_images(sources), config.crops.holdout)
    make_folder(work, private=True)
    settings, mark = config.train, signature(["finishing", asdict(config)], paths) + base.fingerprint
    with accelerated(settings, base) as accelerator:
        objective = FinishingObjective(base, config)
        images, maps = image_pairs(paths, base, work, config, on_progress)
        to_channels_last(base.vae)
        for network in (base.unet, base.structure_encoder, base.text_encoder, base.cfw):
            network.requires_grad_(True)
        trained = [p for p in objective.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        training = Training(
            "finishing",
            objective,
            finishing_batches(images, maps, base, config),
            settings,
            work / "finishing.pt",
            mark,
            on_log=log_to(work / "finishing.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
        with torch.no_grad():
            for parameter, start in zip(trained, before, strict=True):
                parameter.copy_(torch.lerp(start, parameter, config.share))
    base.freeze().save(out, torch.float16)
    return base


def finishing_batches(
    images: np.ndarray[Any, Any], maps: np.ndarray[Any, Any], base: Base, config: FinishingConfig
) -> MakeBatch:
    """Return the function that draws batches of `FinishingObjective` from `image_pairs`."""
    settings, side, channels = config.train, base.config.latent_tile, base.config.latent_channels

    def make_batch(_: int, number: int) -> Batch:
        rng = np.random.default_rng([settings.seed, 11, number])
        chosen = np.sort(rng.choice(len(images), settings.batch, replace=False))
        pixels = torch.from_numpy(images[chosen]).permute(1, 0, 4, 2, 3).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        noise = torch.randn((settings.batch, channels, side, side), generator=generator)
        t = draw_timesteps(settings.batch, config.first_step, generator)
        t[0] = LAST  # image-space losses need at least one sample at the last timestep
        views = draw_views(maps[chosen], base.config.tile, rng)
        return {"hq": pixels[0], "lq": pixels[1], "noise": noise, "t": t, **views}

    return make_batch


def image_pairs(
    paths: list[Path],
    base: Base,
    work: Path,
    config: FinishingConfig,
    on_progress: OnProgress = ignore_progress,
    size: int = PAIR_CHUNK,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Make degraded crops once; returns memory maps: images (pairs, 2, H, W, 3) uint8 and face maps (pairs, 2, 3).

    size: pairs that are made and written at once.
    """
    side, seed, count = base.config.tile, config.train.seed, len(paths) * config.crops.variations
    size = min(size, count)
    make_pair = pair_maker(paths, side, config.crops, seed, size)

    def make(chunk: int) -> Batch:
        pair = make_pair(chunk)
        return {**pair, "maps": torch.from_numpy(face_maps([from_tensor(image[None]) for image in pair["hq"]]))}

    def pack(chunk: Batch) -> Mapping[str, np.ndarray[Any, Any]]:
        both = torch.stack([chunk["hq"], chunk["lq"]], 1).permute(0, 1, 3, 4, 2)
        return {"images": ((both + 1) * 127.5 + 0.5).clamp(0, 255).byte().numpy(), "maps": chunk["maps"].numpy()}

    samples = Samples(
        "images",
        {"images": (np.uint8, (2, side, side, 3)), "maps": (np.float32, (2, 3))},
        count,
        size,
        pairs_signature(paths, side, config.crops, seed),
        make,
        pack,
        config.train.workers,
    )
    arrays = make_arrays(samples, work, on_progress)
    return arrays["images"], arrays["maps"]
