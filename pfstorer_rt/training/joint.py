"""Base and personalization blocks trained together on views: one step from the LQ latent, with losses on images.

The shapes of a batch depend only on the number of references, and nothing waits for the device, so that an iteration
can be a CUDA graph (`capture.CudaGraphs`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.faces.recognizer import FaceRecognizer
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.unet import Tap
from pfstorer_rt.training.data import Batch, draw_timesteps
from pfstorer_rt.training.image_loss import identity_distances, jitter
from pfstorer_rt.training.losses import Losses
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.one_step import OneStepConfig, OneStepObjective, trained_parameters
from pfstorer_rt.training.optimizers import ParameterGroup
from pfstorer_rt.training.prior import ReferenceObjective, block_groups, cut, reference_taps
from pfstorer_rt.training.view_batches import ViewBatches

Encode = Callable[[torch.Tensor], torch.Tensor]
"""Images (B, 3, S, S) in [-1, 1] -> latents (B, C, h, w) fp32."""
Embed = Callable[[torch.Tensor, npt.NDArray[Any]], torch.Tensor]
"""References (B, R, 3, S, S) in [-1, 1] and the positions of their faces (B, R, 2, 3) -> mean embeddings (B, 128)."""
short_training = partial(TrainConfig, batch=64, warmup=40, weight_decay=0.0, attention="sdpa", checkpoint_every=250)
BETAS = (0.9, 0.98)
"""Of AdamW: the second moment follows the short trainings."""


@dataclass(frozen=True)
class JointConfig:
    """Settings of the joint training."""

    base: OneStepConfig = field(
        default_factory=lambda: OneStepConfig(
            short_training(minutes=6.8, learning_rate=3e-4, decay=0.45, ema=0.997),
            window=14,
            clean=0.15,
            lambda_latent=0.3,
            lambda_id=1.0,
        )
    )
    """Losses and length; `clean` is the share of the tiles, and `crop`, `cropped` and `on_faces` are not used."""
    references: int = 4
    """Largest number of references of a sample."""
    fresh: float = 0.4
    """Share of the iterations with new tiles; the others repeat one of the last batches with other random numbers."""
    kept: int = 16
    """Number of batches that are kept for this."""
    refill: int = 2
    refill_every: int = 4
    """`refill` people are generated every `refill_every` iterations."""
    on_faces: float = 0.7
    """Share of the windows on a face, if its position is known."""
    towards: float = 0.3
    """Share of the samples that are decoded from a latent nearer to the original's."""
    weaker: float = 0.2
    """Share of the samples that are decoded with weaker features of the LQ image."""
    unknown: float = 0.15
    """Share of the samples with references whose embedding is replaced by the mean, as without the `metrics` extra."""
    inexact: float = 0.02
    """Standard deviation of the noise on the embeddings."""
    blocks_rate: float = 2.0
    gamma_rate: float = 6.0
    """Learning rates of the blocks with their shifts, and of gamma, as multiples of the rate of the base."""


class JointObjective(OneStepObjective):
    """The losses of `OneStepObjective` on whole images; the first samples of a batch have references and embeddings.

    Window losses (LPIPS, adversarial) are computed on a window of each image, L1 on windows and images, the identity
    loss and the loss of the eyes on the first samples, whose faces have known positions.
    """

    def __init__(
        self, base: Base, config: JointConfig, lpips: Lpips, recognizer: FaceRecognizer, known: ReferenceObjective
    ) -> None:
        """Take the blocks and the token of `known`, which has trained them on latents."""
        super().__init__(base, config.base, lpips, recognizer)
        self.blocks, self.shifts = known.blocks, known.shifts
        self.taps = partial(reference_taps, known)
        self.side = config.base.window * self.factor

    def forward(self, batch: Batch) -> Losses:
        """Take a batch of `JointBatches`; returns `loss`, its terms, and the identity loss of both kinds of samples."""
        c, hq, target = self.config, batch["hq"], batch["hq_image"]
        known = len(batch["references"])
        taps = self.taps(batch["references"], batch["face"])
        taps = {layer: for_first(known, tap) for layer, tap in taps.items()}
        restored = self.restore(hq, batch["lq"], batch["noise"], batch["t"], taps)
        latent = F.mse_loss(restored, hq)
        output = self.decode(restored + batch["towards"] * (hq - restored), batch["lq_image"], batch["weight"])
        losses = self.image_losses(*(cut(image, batch["corners"], self.side) for image in (output, target)))
        losses["pixel"] = (losses["pixel"] + F.l1_loss(output, target)) / 2
        losses |= self.losses_of_means(output, target)
        assert self.recognizer is not None
        faces = len(batch["maps"])
        distances = identity_distances(self.recognizer, output[:faces], target[:faces], batch["maps"])
        losses["id"] = distances.mean()
        losses["eyes"] = self.difference_of_eyes(output[:faces], target[:faces], batch["maps"])
        weights = self.weights(c.lambda_id)
        loss = c.lambda_latent * latent + sum(weights[name] * value for name, value in losses.items())
        with_references = {"id_known": distances[:known].mean(), "id_plain": distances[known:].mean()}
        return {"loss": loss, "latent": latent, **losses, **with_references}

    def groups(self, base: Base, config: JointConfig) -> list[ParameterGroup]:
        """Return the parameter groups: base, blocks, gamma, shifts, discriminator; switches their gradients on."""
        rate = config.base.train.learning_rate
        shifts = list(self.shifts.requires_grad_(True).parameters())
        groups: list[ParameterGroup] = [
            {"params": trained_parameters(base), "lr": rate},
            *block_groups(self.blocks.requires_grad_(True), config.blocks_rate * rate, config.gamma_rate * rate),
            {"params": shifts, "lr": config.blocks_rate * rate},
        ]
        if self.discriminator is not None:
            parameters = list(self.discriminator.parameters())
            groups.append({"params": parameters, "lr": config.base.discriminator_rate, "clip": False})
        return for_device(groups, base.device)


def for_first(count: int, tap: Tap) -> Tap:
    """Return a tap that changes the features of the first `count` samples."""
    return lambda x: tap(x) if len(x) == count else torch.cat([tap(x[:count]), x[count:]])


def for_device(groups: list[ParameterGroup], device: torch.device) -> list[ParameterGroup]:
    """Add the settings of AdamW; the fused one is the fastest on a GPU."""
    return [{**group, "betas": BETAS, "fused": device.type == "cuda"} for group in groups]


class JointBatches:
    """Draws the batches of `JointObjective`; the tiles depend on the batches before, the other numbers on the seed."""

    def __init__(
        self, views: ViewBatches, encode: Encode, embed: Embed, mean: torch.Tensor, config: JointConfig
    ) -> None:
        """mean: the mean embedding of people, (128,)."""
        self.views, self.encode, self.embed, self.mean, self.config = views, encode, embed, mean, config
        self.recent: deque[tuple[Batch, npt.NDArray[Any]]] = deque(maxlen=config.kept)

    def __call__(self, _: int, number: int) -> Batch:
        """Return batch `number`."""
        c, store = self.config, self.views.store
        rng = np.random.default_rng([c.base.train.seed, 43, number])
        if store.generated is not None and number % c.refill_every == 0:
            store.generated.refill(c.refill)
        if len(self.recent) < 2 or rng.random() < c.fresh:
            self.recent.append(self.tiles(rng))
            batch, faces = self.recent[-1]
        else:
            batch, faces = self.recent[int(rng.integers(len(self.recent)))]
        return {**batch, **self.random_numbers(batch, faces, number, rng)}

    def tiles(self, rng: np.random.Generator) -> tuple[Batch, npt.NDArray[Any]]:
        """Make new tiles with their latents; returns them and the positions of the faces."""
        made = self.views(int(rng.integers(1, self.config.references + 1)), self.config.base.clean, rng)
        batch = {
            "hq": self.encode(made.hq),
            "lq": self.encode(made.lq),
            "references": self.encode(made.references.flatten(0, 1)).unflatten(0, made.references.shape[:2]),
            "hq_image": made.hq,
            "lq_image": made.lq,
            "face": self.embed(made.references, made.reference_faces),
        }
        return batch, made.faces

    def random_numbers(self, batch: Batch, faces: npt.NDArray[Any], number: int, rng: np.random.Generator) -> Batch:
        """Draw noise, timesteps, places of the windows and faces, the sample's decoding, and the embeddings' errors."""
        c, hq, count = self.config, batch["hq"], len(batch["hq"])
        factor = self.views.store.size // hq.shape[-1]
        seeds = c.base.train.seed * 1_000_003 + number
        some = [
            np.where(rng.random(count) < share, rng.random(count), usual)
            for share, usual in ((c.towards, 0.0), (c.weaker, 1.0))
        ]
        towards, weight = (torch.from_numpy(x.astype(np.float32)).view(-1, 1, 1, 1) for x in some)
        moved = (faces @ jitter(len(faces), rng)).astype(np.float32)
        corners = draw_corners(count, faces, c.base.window * factor, self.views.store.size, c.on_faces, rng)
        drawn = {
            "t": draw_timesteps(count, c.base.first_step, torch.Generator().manual_seed(seeds)),
            "towards": towards,
            "weight": weight,
            "corners": torch.from_numpy(corners),
            "maps": torch.from_numpy(moved),
        }
        made = {name: value.to(hq.device, non_blocking=True) for name, value in drawn.items()}
        generator = torch.Generator(hq.device).manual_seed(seeds)
        made["noise"] = torch.randn(hq.shape, generator=generator, device=hq.device)
        face = batch["face"]
        unknown = torch.rand((len(face), 1), generator=generator, device=hq.device) < c.unknown
        noisy = face + c.inexact * torch.randn(face.shape, generator=generator, device=hq.device)
        return {**made, "face": torch.where(unknown, self.mean, noisy)}


def draw_corners(
    count: int, faces: npt.NDArray[Any], side: int, size: int, on_faces: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw the corners (count, 2), top and left, of square windows in tiles of `size` pixels.

    faces: positions (F, 2, 3) in the first tiles; a share `on_faces` of their windows lies on the face.
    """
    corners = rng.integers(0, size - side + 1, (count, 2))
    centres = faces[:, ::-1, 2] + rng.uniform(-0.35, 0.35, (len(faces), 2))
    near = np.clip(np.round((centres + 1) / 2 * size - side / 2), 0, size - side).astype(np.int64)
    chosen = rng.random((len(faces), 1)) < on_faces
    corners[: len(faces)] = np.where(chosen, near, corners[: len(faces)])
    return corners
