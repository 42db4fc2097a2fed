"""The last part of a base's training: from the LQ picture to the restored one, judged as a face, not as a latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.diffusion import LAST, noisy_latent, x0_from_prediction
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.files import from_tensor
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import Base, fingerprint_modules
from pfstorer_rt.ops import training_backend
from pfstorer_rt.training.base import (
    PAIR_CHUNK,
    BaseTrainConfig,
    log_to,
    pair_maker,
    pairs_signature,
    signature,
    split_holdout,
)
from pfstorer_rt.training.chunks import make_arrays
from pfstorer_rt.training.data import Batch, draw_timesteps
from pfstorer_rt.training.loop import make_accelerator, train
from pfstorer_rt.training.losses import Losses
from pfstorer_rt.training.memory import make_adamw
from pfstorer_rt.training.objectives import RestorerObjective
from pfstorer_rt.training.picture_loss import PictureLoss, draw_views, find_faces


class FinishingObjective(RestorerObjective):
    """L_x0, the squared error of the clean latent at every timestep, and `PictureLoss` of the rows at timestep 999.

    Those begin as restoring does, from the LQ latent. Trained are the UNet, structure encoder, prompt encoder and
    feature wrapping; the autoencoder stays.
    """

    def __init__(self, base: Base, config: BaseTrainConfig) -> None:
        super().__init__(base, "x0")
        self.base, self.cfw, self.pictures = base, base.cfw, PictureLoss(base, config)

    def forward(self, batch: Batch) -> Losses:
        """Take `hq` and `lq` (B, 3, H, W) in [-1, 1], `noise` (B, C, h, w), `t` (B,), `maps` (B, 2, 3), `corner` (2,).

        The latter two are `PictureLoss`'s.
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
        seen = self.pictures(
            restored[first],
            {level: f[first] for level, f in features.items()},
            hq[first],
            batch["maps"][first],
            batch["corner"],
        )
        return {"loss": diff + seen.pop("pictures"), "diff": diff, **seen}


def finish_base(sources: Sequence[Path], base: Base, out: Path, config: BaseTrainConfig, work: Path) -> Base:
    """Train a base that restores already further on what its pictures look like, and write it to `out` in fp16.

    The result's weights lie `config.share` of the way from the prior's to the trained ones: all of it gives sharper
    pictures with ragged eyes, nothing of it softer ones (weights in between: WiSE-FT, Wortsman 2022, section 3).

    sources, config, work: as for `train_base`; the settings are those of `config.restorer`. Raises `BadFileError` for
    a base without feature wrapping, `MissingBackendError` without the `metrics` extra.
    """
    if base.cfw is None:
        raise BadFileError(f"base {base.config.name!r} has no feature wrapping; train it first (--train wrapping)")
    make_folder(work, private=True)
    paths, _ = split_holdout(find_images(sources), config.holdout)
    accelerator, settings = make_accelerator(config.restorer), config.restorer
    base.to(accelerator.device).set_attention(training_backend(accelerator.device))
    mark = signature(["finishing", asdict(config)], paths) + base.fingerprint
    objective = FinishingObjective(base, config).to(accelerator.device)
    pictures, maps = picture_pairs(paths, base, work, config)
    nn.Module.to(objective, memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.Module.to(base.vae, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for network in (base.unet, base.structure_encoder, base.text_encoder, base.cfw):
        network.requires_grad_(True)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainable]
    side, channels = base.config.latent_tile, base.config.latent_channels

    def make_batch(iteration: int) -> Batch:
        number = iteration * accelerator.num_processes + accelerator.process_index
        rng = np.random.default_rng([settings.seed, 11, number])
        chosen = np.sort(rng.choice(len(pictures), settings.batch, replace=False))
        pixels = torch.from_numpy(pictures[chosen]).permute(1, 0, 4, 2, 3).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        noise = torch.randn((settings.batch, channels, side, side), generator=generator)
        t = draw_timesteps(settings.batch, config.first_step, generator)
        t[0] = LAST  # so that there always is a picture to look at
        views = draw_views(maps[chosen], base.config.tile, rng)
        return {"hq": pixels[0], "lq": pixels[1], "noise": noise, "t": t, **views}

    optimizer = make_adamw(trainable, settings)
    train(
        objective,
        optimizer,
        make_batch,
        settings,
        accelerator,
        work / "finishing.pt",
        mark,
        "finishing",
        log_to(work / "finishing.csv"),
    )
    with torch.no_grad():
        for parameter, start in zip(trainable, before, strict=True):
            parameter.copy_(torch.lerp(start, parameter, config.share))
    base.freeze().set_attention()
    base.fingerprint = fingerprint_modules(base.modules())
    base.save(out, torch.float16)
    return base


def picture_pairs(
    paths: list[Path], base: Base, work: Path, config: BaseTrainConfig
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Make degraded squares once: memory maps (pairs, 2, H, W, 3) uint8 of hq and lq, and (pairs, 2, 3) of faces."""
    count, side = len(paths) * config.variations, base.config.tile
    make_pair = pair_maker(paths, base, config, PAIR_CHUNK)

    def make(chunk: int) -> Batch:
        pair = make_pair(chunk)
        return {**pair, "maps": torch.from_numpy(find_faces([from_tensor(image[None]) for image in pair["hq"]]))}

    def pack(chunk: Batch) -> Mapping[str, np.ndarray[Any, Any]]:
        both = torch.stack([chunk["hq"], chunk["lq"]], 1).permute(0, 1, 3, 4, 2)
        return {"pictures": ((both + 1) * 127.5 + 0.5).clamp(0, 255).byte().numpy(), "maps": chunk["maps"].numpy()}

    arrays = make_arrays(
        work,
        "pictures",
        {"pictures": (np.uint8, (2, side, side, 3)), "maps": (np.float32, (2, 3))},
        count,
        PAIR_CHUNK,
        pairs_signature(paths, base, config),
        make,
        config.restorer.workers,
        pack,
    )
    return arrays["pictures"], arrays["maps"]
