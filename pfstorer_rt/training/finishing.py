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

from pfstorer_rt.attention import training_backend
from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.evaluation.metrics import INSTALL_METRICS, face_models
from pfstorer_rt.files import make_folder
from pfstorer_rt.image import from_tensor
from pfstorer_rt.models.base import Base, fingerprint_modules
from pfstorer_rt.models.prompt import tokenize
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
from pfstorer_rt.training.data import Batch, draw_timesteps, find_images
from pfstorer_rt.training.loop import make_accelerator, train
from pfstorer_rt.training.losses import Losses, gradient_loss, noisy_latent, x0_from_prediction
from pfstorer_rt.training.memory import make_adamw
from pfstorer_rt.training.recognizer import RECOGNIZER, FaceAligner, FaceRecognizer, cut_faces

LAST = 999
"""The timestep at which restoring starts; with few steps nearly all is decided there."""


class FinishingObjective(nn.Module):
    """`L_x0 + lambda_pixel L_pixel + lambda_id L_id`, the latter two of the pictures restored in one step.

    L_x0: squared error of the clean latent, at every timestep; rows at timestep 999 begin as restoring does, from the
    LQ latent. L_pixel: L1 + gradient L1 after the decoder. L_id: squared distance between the recognizer's embeddings
    of the restored face and the original's (the identity-preserving loss of GFPGAN, section 3.4, with dlib's network).
    Trained are the UNet, structure encoder, prompt encoder and feature wrapping; the autoencoder stays.
    """

    alphas_cumprod: torch.Tensor
    ids: torch.Tensor

    def __init__(self, base: Base, recognizer: FaceRecognizer, config: BaseTrainConfig) -> None:
        super().__init__()
        self.config, self.base, self.recognizer = config, base, recognizer
        self.unet, self.structure_encoder, self.text_encoder = base.unet, base.structure_encoder, base.text_encoder
        self.cfw, self.prediction_type = base.cfw, base.config.prediction_type
        self.register_buffer("alphas_cumprod", base.scheduler.alphas_cumprod.clone(), persistent=False)
        self.register_buffer("ids", tokenize(base.config.prompt, base.config), persistent=False)

    def forward(self, batch: Batch) -> Losses:
        """Take `hq` and `lq` (B, 3, H, W) in [-1, 1], `noise` (B, C, h, w), `t` (B,), and `maps` (B, 2, 3).

        maps: where each original's face is (`FaceAligner`), NaN where none was found.
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
        output = self.cfw(self.base.vae, restored[first], {k: v[first] for k, v in features.items()}, 1.0).float()
        pixel = F.l1_loss(output, hq[first]) + gradient_loss(output, hq[first])
        identity = self.identity_loss(output, hq[first], batch["maps"][first])
        loss = diff + self.config.lambda_pixel * pixel + self.config.lambda_id * identity
        return {"loss": loss, "diff": diff, "pixel": pixel, "id": identity}

    def identity_loss(self, output: torch.Tensor, target: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of the embeddings of (B, 3, H, W) in [-1, 1], over the pictures with a face."""
        seen = maps.isfinite().all(2).all(1)
        if not seen.any():
            return output.new_zeros(())
        faces = (self.recognizer(cut_faces((z[seen] + 1) / 2, maps[seen])).float() for z in (output, target))
        restored, original = faces
        return (restored - original.detach()).square().sum(1).mean()


def finish_base(sources: Sequence[Path], base: Base, out: Path, config: BaseTrainConfig, work: Path) -> Base:
    """Train a base that restores already further on what its pictures look like, and write it to `out` in fp16.

    sources, config, work: as for `train_base`; the settings are those of `config.restorer`. Raises `BadFileError` for
    a base without feature wrapping, `MissingBackendError` without the `metrics` extra.
    """
    folder = face_models()
    if folder is None:
        raise MissingBackendError(f"the identity loss needs dlib's recognizer; {INSTALL_METRICS}")
    if base.cfw is None:
        raise BadFileError(f"base {base.config.name!r} has no feature wrapping; train it first (--train wrapping)")
    make_folder(work)
    paths, _ = split_holdout(find_images(sources), config.holdout)
    accelerator, settings = make_accelerator(config.restorer), config.restorer
    base.to(accelerator.device).set_attention(training_backend(accelerator.device))
    mark = signature(["finishing", asdict(config)], paths) + base.fingerprint
    pictures, maps = picture_pairs(paths, base, folder, work, config)
    objective = FinishingObjective(base, FaceRecognizer(folder / RECOGNIZER).to(accelerator.device), config)
    nn.Module.to(objective, memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.Module.to(base.vae, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for network in (base.unet, base.structure_encoder, base.text_encoder, base.cfw):
        network.requires_grad_(True)
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
        faces = np.einsum("bij,bjk->bik", maps[chosen], jitter(settings.batch, rng))
        return {"hq": pixels[0], "lq": pixels[1], "noise": noise, "t": t, "maps": torch.from_numpy(faces).float()}

    optimizer = make_adamw([p for p in objective.parameters() if p.requires_grad], settings)
    train(
        objective, optimizer, make_batch, settings, accelerator, work / "finishing.pt", mark, "finishing",
        log_to(work / "finishing.csv"),
    )  # fmt: skip
    base.freeze().set_attention()
    base.fingerprint = fingerprint_modules(base.modules())
    base.save(out, torch.float16)
    return base


def jitter(count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw small turns, scales and shifts (count, 3, 3): a face that is liked in one position only is no likeness."""
    angle, scale = rng.uniform(-0.1, 0.1, count), np.exp(rng.uniform(-0.06, 0.06, count))
    cos, sin, (x, y) = scale * np.cos(angle), scale * np.sin(angle), rng.uniform(-0.06, 0.06, (2, count))
    zero, one = np.zeros(count), np.ones(count)
    return np.stack([cos, -sin, x, sin, cos, y, zero, zero, one], 1).reshape(count, 3, 3)


def picture_pairs(
    paths: list[Path], base: Base, folder: Path, work: Path, config: BaseTrainConfig
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Make degraded squares once: memory maps (pairs, 2, H, W, 3) uint8 of hq and lq, and (pairs, 2, 3) of faces."""
    count, side = len(paths) * config.variations, base.config.tile
    make_pair, find = pair_maker(paths, base, config, PAIR_CHUNK), FaceAligner(folder)

    def make(chunk: int) -> Batch:
        pair = make_pair(chunk)
        found = [find(from_tensor(image[None])) for image in pair["hq"]]
        none = np.full((2, 3), np.nan, np.float32)
        pair["maps"] = torch.from_numpy(np.stack([none if one is None else one for one in found]))
        return pair

    def pack(chunk: Batch) -> Mapping[str, np.ndarray[Any, Any]]:
        both = torch.stack([chunk["hq"], chunk["lq"]], 1).permute(0, 1, 3, 4, 2)
        return {"pictures": ((both + 1) * 127.5 + 0.5).clamp(0, 255).byte().numpy(), "maps": chunk["maps"].numpy()}

    arrays = make_arrays(
        work, "pictures", {"pictures": (np.uint8, (2, side, side, 3)), "maps": (np.float32, (2, 3))}, count, PAIR_CHUNK,
        pairs_signature(paths, base, config), make, config.restorer.workers, pack,
    )  # fmt: skip
    return arrays["pictures"], arrays["maps"]
