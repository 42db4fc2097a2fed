"""The prior of the personalization blocks: they learn from many people how to use the references of an unknown one.

1. The blocks alone are trained on latents. They start as a search for the most similar feature of the references.
   Blocks that started as copies of the base's layers ignored the references.
2. Blocks and base are trained together with losses on images. The base without a prior has learned to restore an image
   from its degraded version alone, so its decoder expects nothing in the latents that the degraded image lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.diffusion import LAST
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.faces.recognizer import FaceRecognizer
from pfstorer_rt.files import make_folder
from pfstorer_rt.models.base import Base, fingerprint_modules
from pfstorer_rt.models.personalization import PersonalizationBlocks, build_blocks
from pfstorer_rt.models.prior import FaceShifts, Prior
from pfstorer_rt.models.prompt import tokenize
from pfstorer_rt.models.reference import reference_pass, subject_ids
from pfstorer_rt.models.unet import Tap
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Arrays
from pfstorer_rt.training.data import Batch, draw_timesteps
from pfstorer_rt.training.device import accelerated, kernels_for, to_channels_last
from pfstorer_rt.training.image_loss import jitter
from pfstorer_rt.training.latents import encode_pool, flip, to_pixels
from pfstorer_rt.training.loop import Training, log_to, run_training, signature
from pfstorer_rt.training.losses import Losses
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.objectives import RestorerObjective
from pfstorer_rt.training.one_step import (
    MARGIN,
    OneStepConfig,
    OneStepObjective,
    WindowSampler,
    around,
    face_of,
    trained_parameters,
)
from pfstorer_rt.training.optimizers import ParameterGroup
from pfstorer_rt.training.tiles import Bytes

GAMMA, SHARPNESS = 0.3, 2.5
"""Initial gate of the blocks, and initial scale of queries and keys."""
TIMESTEP = LAST
"""Timestep of the references: their features resemble those of the degraded image most at the same timestep."""


@dataclass(frozen=True)
class PriorConfig:
    """Settings of the training of a prior."""

    matching: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            iterations=500, batch=8, learning_rate=1e-3, warmup=30, decay=0.5, ema=0.99, weight_decay=0.0
        )
    )
    """Training of the blocks on latents."""
    same_photo: float = 0.35
    """Share of the samples on latents whose references are views of the sample's own photograph."""
    base: OneStepConfig = field(
        default_factory=lambda: OneStepConfig(
            TrainConfig(
                iterations=2000, batch=2, learning_rate=1.5e-4, warmup=50, decay=0.4, ema=0.995, weight_decay=0.0
            ),
            cropped=1.0,
            clean=0.2,
            lambda_pixel=1.2,
            window=8,
        )
    )
    """Losses of the samples without references, and the length of the training on images."""
    people: int = 2
    """Samples with references in a batch."""
    references: int = 4
    """Largest number of references of a sample."""
    clean: float = 0.1
    """Share of the iterations whose samples with references are not degraded."""
    crop: int = 20
    """Side in latent pixels of the square around the face that is decoded."""
    window: int = 10
    """Side in latent pixels of the square on the face for the perceptual and adversarial losses."""
    learning_rate: float = 6e-4
    """Learning rate of the blocks."""
    gamma_learning_rate: float = 3e-3
    lambda_latent: float = 0.3
    lambda_id: float = 0.6


class ReferenceObjective(RestorerObjective):
    """The squared error of the clean latents, restored with references in one step; trains the blocks alone.

    It is much cheaper than the losses on images, so it sees many more samples, and it teaches the blocks to find the
    features of a reference that correspond to those of the degraded image.
    """

    def __init__(self, base: Base, scales: Mapping[str, float]) -> None:
        """Start with the prior of the base if it is instant, else as a search; scales: as in `match_features`."""
        super().__init__(base, "x0")
        settings = PersonalizeConfig.for_base(base.config)
        self.blocks = build_blocks(base.unet, base.config.layers, base.config.head_size)
        ids, _ = subject_ids(base, settings.subject_prompt)
        self.token = nn.Parameter(self.text_encoder.word_embedding(tokenize(settings.init_word, base.config)))
        self.shifts = FaceShifts(self.blocks).requires_grad_(False)  # `joint` trains them
        self.register_buffer("subject_ids", ids, persistent=False)
        if base.prior is None or not base.prior.instant:
            match_features(self.blocks, scales)
        else:
            base.prior.copy_to(self.blocks)
            self.token.data.copy_(base.prior.token)
            self.shifts.load_state_dict(base.prior.shifts.state_dict())

    def forward(self, batch: Batch) -> Losses:
        """Take latents `hq lq noise` (B, C, h, w), `t` (B,), and `references` (B, R, C, h, w)."""
        taps = reference_taps(self, batch["references"])
        restored = self.restore(batch["hq"], batch["lq"], batch["noise"], batch["t"], taps)
        return {"loss": F.mse_loss(restored, batch["hq"])}


def reference_taps(
    known: ReferenceObjective, references: torch.Tensor, faces: torch.Tensor | None = None
) -> dict[str, Tap]:
    """Return the blocks on the features of references (B, R, C, h, w), which are side by side.

    faces: embeddings (B, 128) of the people, None if they are unknown.
    """
    b, r = references.shape[:2]
    with torch.no_grad():
        subject = known.text_encoder(known.subject_ids, known.token).expand(b * r, -1, -1)
        parts = known.unet, known.structure_encoder, references.flatten(0, 1), subject, known.blocks.layers
        seen = reference_pass(*parts, TIMESTEP, known.alphas_cumprod)
    torch.clear_autocast_cache()  # weights that were cast without gradients must not be used with gradients
    features = {layer: s.features.unflatten(0, (b, r)).flatten(1, 2) for layer, s in seen.items()}
    shifts = [None] * len(known.blocks) if faces is None else known.shifts(faces)
    return {
        block.layer: partial(block, reference=features[block.layer], shift=shift)
        for block, shift in zip(known.blocks, shifts, strict=True)
    }


class PriorObjective(OneStepObjective):
    """The losses of `OneStepObjective` on samples without references, plus the same losses with references.

    With references, every sample is decoded around its face, because the face counts.
    """

    def __init__(
        self,
        base: Base,
        config: PriorConfig,
        lpips: Lpips,
        recognizer: FaceRecognizer | None,
        known: ReferenceObjective,
    ) -> None:
        """Take the blocks and the token of `known`, which has trained them on latents."""
        super().__init__(base, config.base, lpips, recognizer)
        self.prior, self.blocks, self.token = config, known.blocks, known.token
        self.taps = partial(reference_taps, known)
        nn.Module.requires_grad_(self.blocks, True)

    def forward(self, batch: Batch) -> Losses:
        """Take the batch of `OneStepObjective`, and the batch of `PeopleSampler` with `person_` before each name."""
        losses = super().forward({k: v for k, v in batch.items() if not k.startswith("person_")})
        person = {k.removeprefix("person_"): v for k, v in batch.items() if k.startswith("person_")}
        known = self.with_references(person)
        loss = losses.pop("loss") + known.pop("loss")
        return {"loss": loss, **losses, **{f"person_{name}": value for name, value in known.items()}}

    def with_references(self, batch: Batch) -> Losses:
        """Return the losses of samples `hq lq noise` (B, C, h, w) with `references` (B, R, C, h, w).

        `hq_crop lq_crop` (B, 3, P, P) are squares of the images, margins included, that begin at `places` (B, 2) of the
        latents. `maps` (B, 2, 3) are the faces in the squares without margins, and `corners` (B, 2) the corners of the
        windows in these, in latent pixels.
        """
        p = self.prior
        restored = self.restore(batch["hq"], batch["lq"], batch["noise"], batch["t"], self.taps(batch["references"]))
        latent = F.mse_loss(restored, batch["hq"])
        part = cut(restored, batch["places"], batch["lq_crop"].shape[-1] // self.factor)
        border = MARGIN * self.factor
        inner = (..., slice(border, -border), slice(border, -border))
        output, target = self.decode(part, batch["lq_crop"])[inner], batch["hq_crop"][inner]
        windows = (cut(image, batch["corners"] * self.factor, p.window * self.factor) for image in (output, target))
        losses = self.image_losses(*windows)
        losses["pixel"] = (losses["pixel"] + F.l1_loss(output, target)) / 2
        losses |= self.losses_of_means(output, target)
        losses["id"] = self.identity(output, target, batch["maps"])
        weights = self.weights(p.lambda_id)
        loss = p.lambda_latent * latent + sum(weights[name] * value for name, value in losses.items())
        return {"loss": loss, "latent": latent, **losses}


def cut(maps: torch.Tensor, corners: torch.Tensor, side: int) -> torch.Tensor:
    """Cut a square from each map (B, C, H, W); corners: (B, 2), top and left."""
    b, c, _, width = maps.shape
    y, x = (corners[:, i, None] + torch.arange(side, device=maps.device) for i in (0, 1))
    rows = maps.gather(2, y[:, None, :, None].expand(b, c, side, width))
    return rows.gather(3, x[:, None, None, :].expand(b, c, side, side))


@torch.no_grad()
def match_features(blocks: PersonalizationBlocks, scales: Mapping[str, float]) -> None:
    """Initialise the blocks so that they move every feature towards the most similar features of the references.

    Queries, keys and values are one random rotation of the features, so each head compares another part of them. The
    self-attention subtracts half of the feature itself. This does not change the normalized queries of the attention
    to the references. scales: standard deviation of the features by layer, because the features of a reference are not
    normalised. The rotation comes from torch's global generator.
    """
    for block in blocks:
        width, scale, new = block.gamma.numel(), scales[block.layer], cast(Any, block.block)
        rotation = torch.linalg.qr(torch.randn(width, width))[0]
        for attention, sign, deviation in ((new.attn1, -0.5, 1.0), (new.attn2, 0.5, scale)):
            attention.to_q.weight.copy_(SHARPNESS * rotation)
            attention.to_k.weight.copy_(SHARPNESS * rotation / deviation)
            attention.to_v.weight.copy_(rotation / deviation)
            attention.to_out[0].weight.copy_(sign * scale * rotation.T)
            attention.to_out[0].bias.zero_()
        new.ff.net[2].weight.zero_()
        new.ff.net[2].bias.zero_()
        block.gamma.fill_(GAMMA)


@torch.no_grad()
def feature_scales(base: Base, latents: torch.Tensor) -> dict[str, float]:
    """Return the mean standard deviation of the features of undegraded latents (B, C, h, w), by layer."""
    context, alphas = base.encode_prompt().expand(len(latents), -1, -1), base.schedule.alphas_cumprod_tensor()
    parts = base.unet, base.structure_encoder, latents, context, base.config.layers
    seen = reference_pass(*parts, TIMESTEP, alphas.to(latents.device))
    return {layer: float(s.features.float().std((0, 1)).mean()) for layer, s in seen.items()}


class PeopleSampler:
    """Draws samples with references of the same person, as a pure function of (seed, number)."""

    def __init__(self, pool: Arrays, latents: npt.NDArray[Any], config: PriorConfig) -> None:
        self.pool, self.latents, self.config = pool, latents, config
        self.person, self.photo = np.array(pool["person"]), np.array(pool["photo"])

    def latents_of(self, number: int, count: int) -> Batch:
        """Return batch `number` of `ReferenceObjective` with `count` samples."""
        rng = np.random.default_rng([self.config.base.train.seed, 41, number])
        tiles, versions = self.latents.shape[:2]
        chosen = rng.integers(0, tiles, count), rng.integers(0, versions, count)
        latents = torch.from_numpy(self.latents[chosen]).float()
        r = int(rng.integers(1, self.config.references + 1))
        return {
            "hq": latents[:, 0],
            "lq": latents[:, 1],
            "noise": torch.from_numpy(rng.standard_normal(latents[:, 0].shape, np.float32)),
            "t": torch.full((count,), LAST),
            "references": torch.stack([self.references(k, r, rng, self.config.same_photo) for k in chosen[0]]),
        }

    def __call__(self, number: int) -> Batch:
        """Return batch `number` of `PriorObjective.with_references`."""
        c, settings = self.config, self.config.base.train
        rng = np.random.default_rng([settings.seed, 37, number])
        tiles, versions = self.latents.shape[:2]
        chosen = rng.integers(0, tiles, c.people), rng.integers(0, versions, c.people)
        pairs, count = list(zip(*chosen, strict=True)), int(rng.integers(1, c.references + 1))
        size, side = self.latents.shape[-1], c.crop + 2 * MARGIN
        faces = [face_of(self.pool, k, v) for k, v in pairs]
        places = [around(face, side, size, 0.2, rng) for face in faces]
        crops = [self.crops(k, v, place, side) for (k, v), place in zip(pairs, places, strict=True)]
        maps = [in_square(f, place + MARGIN, c.crop, size) for f, place in zip(faces, places, strict=True)]
        hq, lq = (to_pixels(np.stack(images)) for images in zip(*crops, strict=True))
        latents = torch.from_numpy(self.latents[chosen]).float()
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        clean = rng.random() < c.clean
        return {
            "hq": latents[:, 0],
            "lq": latents[:, 0 if clean else 1],
            "noise": torch.randn(latents[:, 0].shape, generator=generator),
            "t": draw_timesteps(c.people, c.base.first_step, generator),
            "references": torch.stack([self.references(k, count, rng) for k in chosen[0]]),
            "hq_crop": hq,
            "lq_crop": hq if clean else lq,
            "places": torch.from_numpy(np.stack(places)),
            "maps": torch.from_numpy((np.stack(maps) @ jitter(c.people, rng)).astype(np.float32)),
            "corners": torch.from_numpy(np.stack([around(m, c.window, c.crop, 0.5, rng) for m in maps])),
        }

    def crops(self, tile: int, version: int, place: npt.NDArray[np.int64], side: int) -> tuple[Bytes, Bytes]:
        """Return a square of a tile and of its degraded version; place and side are in latent pixels."""
        factor = self.pool["hq"].shape[1] // self.latents.shape[-1]
        (top, left), length = (place * factor).tolist(), side * factor
        where = (slice(top, top + length), slice(left, left + length))
        return flip(self.pool["hq"][tile], version)[where], flip(self.pool["lq"][tile, version], version)[where]

    def references(self, tile: int, count: int, rng: np.random.Generator, same_photo: float = 0.0) -> torch.Tensor:
        """Draw latents (count, C, h, w) of other photographs of the person in a tile, undegraded.

        same_photo: probability of views of the same photograph instead, which teach the blocks to find corresponding
        features.
        """
        photo = (self.photo == self.photo[tile]) == (rng.random() < same_photo)
        others = np.flatnonzero((self.person == self.person[tile]) & photo)
        rows = rng.choice(others, count, replace=len(others) < count)
        versions = rng.integers(0, self.latents.shape[1], count)
        return torch.from_numpy(self.latents[rows, versions, 0]).float()


def in_square(face: npt.NDArray[Any], corner: npt.NDArray[np.int64], side: int, size: int) -> npt.NDArray[Any]:
    """Return the map (2, 3) of a face in a square of `side` that begins at `corner` (top, left) of one of `size`."""
    moved = face * (size / side)
    moved[:, 2] += (size - 2 * corner[::-1]) / side - 1
    return moved


def train_prior(
    people: Arrays,
    tiles: Arrays,
    base: Base,
    work: Path,
    config: PriorConfig,
    lpips: Path,
    recognizer: Path | None,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """Train the base and its prior in place, on people and on tiles without references; resumes from `work/prior.pt`.

    people: from `make_people_pool`. tiles: from `tile_pool.make_pool`, with degraded versions. lpips: NPZ file of the
    weights. recognizer: dlib's network, for the identity loss. Raises `BadFileError` for a base without feature
    wrapping.
    """
    if base.cfw is None:
        raise BadFileError(f"base {base.config.name!r} has no feature wrapping; expected a base with `cfw`")
    crop = min(config.crop, base.config.latent_tile - 2 * MARGIN)
    config = replace(config, crop=crop, window=min(config.window, crop))
    settings = config.base.train
    with accelerated(settings, base) as accelerator:
        to_channels_last(base.vae)
        encoded = []
        for name, pool in (("people", people), ("tiles", tiles)):
            make_folder(work / name)
            encoded.append(encode_pool(pool, base, work / name, accelerator, settings.workers, on_progress))
        known, plain = PeopleSampler(people, encoded[0], config), WindowSampler(tiles, encoded[1], config.base)
        face = FaceRecognizer(recognizer) if recognizer and config.lambda_id else None
        mark = signature([asdict(config), base.fingerprint, [list(latents.shape) for latents in encoded]], [])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            matching = ReferenceObjective(base, feature_scales(base, torch.from_numpy(encoded[0][:8, 0, 0]).float()))
            objective = PriorObjective(base, config, Lpips(lpips), face, matching)
        base.set_attention(kernels_for(settings, accelerator.device), matching)

        def on_images(_: int, number: int) -> Batch:
            return {**plain(number), **{f"person_{name}": value for name, value in known(number).items()}}

        latents_alone = Training(
            "matching",
            matching,
            lambda _, number: known.latents_of(number, config.matching.batch),
            config.matching,
            work / "matching.pt",
            mark,
            parameter_groups(matching, config.matching.learning_rate, config.gamma_learning_rate),
            on_log=log_to(work / "matching.csv"),
            on_progress=on_progress,
        )
        run_training(latents_alone, accelerator)
        images = Training(
            "prior",
            objective,
            on_images,
            settings,
            work / "prior.pt",
            mark,
            all_groups(objective, base, config),
            on_log=log_to(work / "prior.csv"),
            on_progress=on_progress,
        )
        run_training(images, accelerator)
    keep_prior(base, matching)


def keep_prior(base: Base, known: ReferenceObjective) -> None:
    """Store the trained blocks and their token as the prior of a base, and end its training."""
    base.prior = Prior(base.unet, base.config)
    base.prior.blocks.load_state_dict(known.blocks.state_dict())
    base.prior.token.data.copy_(known.token.data)
    base.prior.shifts.load_state_dict(known.shifts.state_dict())
    base.freeze()
    base.fingerprint = fingerprint_modules(base.modules())


def parameter_groups(known: ReferenceObjective | PriorObjective, rate: float, gamma: float) -> list[ParameterGroup]:
    """Return the groups of blocks, and of gamma and token."""
    blocks, gates = block_groups(known.blocks, rate, gamma)
    return [blocks, {**gates, "params": [*gates["params"], known.token]}]


def block_groups(blocks: PersonalizationBlocks, rate: float, gamma: float) -> list[ParameterGroup]:
    """Return the groups of the blocks and of their gates."""
    gates = [block.gamma for block in blocks]
    own = {id(gate) for gate in gates}
    others = [p for p in blocks.parameters() if id(p) not in own]
    return [{"params": others, "lr": rate}, {"params": gates, "lr": gamma}]


def all_groups(objective: PriorObjective, base: Base, config: PriorConfig) -> list[ParameterGroup]:
    """Return the groups of the training on images: base, blocks, gamma and token, discriminator."""
    groups: list[ParameterGroup] = [
        {"params": trained_parameters(base)},
        *parameter_groups(objective, config.learning_rate, config.gamma_learning_rate),
    ]
    if objective.discriminator is not None:
        rate = config.base.discriminator_rate
        groups.append({"params": list(objective.discriminator.parameters()), "lr": rate})
    return groups
