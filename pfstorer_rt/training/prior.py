"""The prior of the personalization blocks: they learn from many people how to use the references of an unknown one.

Blocks and base are trained together. The base without a prior has learned to restore an image from its degraded version
alone, so its decoder expects nothing in the latents that is not in the degraded image as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.faces.recognizer import FaceRecognizer, cut_faces
from pfstorer_rt.files import make_folder
from pfstorer_rt.models.base import Base, fingerprint_modules
from pfstorer_rt.models.personalization import PersonalizationBlocks, build_blocks
from pfstorer_rt.models.prior import Prior
from pfstorer_rt.models.prompt import tokenize
from pfstorer_rt.models.reference import reference_pass, subject_ids
from pfstorer_rt.models.unet import RestorationUNet, Tap
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Arrays
from pfstorer_rt.training.data import Batch, draw_timesteps
from pfstorer_rt.training.device import accelerated, to_channels_last
from pfstorer_rt.training.image_loss import jitter
from pfstorer_rt.training.latents import encode_pool, flip, is_flipped, to_pixels
from pfstorer_rt.training.loop import Training, log_to, run_training, signature
from pfstorer_rt.training.losses import Losses
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.memory import ParameterGroup
from pfstorer_rt.training.one_step import MARGIN, OneStepConfig, OneStepObjective, WindowSampler
from pfstorer_rt.training.tiles import Bytes

INITIAL_GAMMA = 0.1
"""Initial gate of the blocks. They start as copies of trained layers, so they need not start closed."""


@dataclass(frozen=True)
class PriorConfig:
    """Settings of the training of a prior."""

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
    """Losses of the samples without references, and the length of the training."""
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


class PriorObjective(OneStepObjective):
    """The losses of `OneStepObjective` on samples without references, plus the same losses with references.

    With references, every sample is decoded around its face, because the face counts.
    """

    base_ids: torch.Tensor

    def __init__(
        self,
        base: Base,
        config: PriorConfig,
        lpips: Lpips,
        recognizer: FaceRecognizer | None,
        scales: Mapping[str, float],
    ) -> None:
        super().__init__(base, config.base, lpips, recognizer)
        self.prior = config
        settings = PersonalizeConfig.for_base(base.config)
        self.blocks = build_blocks(base.unet, base.config.layers, base.config.head_size)
        copy_layers(base.unet, self.blocks, scales)
        ids, _ = subject_ids(base, settings.subject_prompt)
        self.token = nn.Parameter(self.text_encoder.word_embedding(tokenize(settings.init_word, base.config)))
        self.register_buffer("subject_ids", ids, persistent=False)

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
        c, p = self.config, self.prior
        restored = self.restore(batch["hq"], batch["lq"], batch["noise"], batch["t"], self.taps(batch["references"]))
        latent = F.mse_loss(restored, batch["hq"])
        part = cut(restored, batch["places"], batch["lq_crop"].shape[-1] // self.factor)
        border = MARGIN * self.factor
        inner = (..., slice(border, -border), slice(border, -border))
        output, target = self.decode(part, batch["lq_crop"])[inner], batch["hq_crop"][inner]
        windows = (cut(image, batch["corners"] * self.factor, p.window * self.factor) for image in (output, target))
        losses = self.image_losses(*windows)
        losses["pixel"] = (losses["pixel"] + F.l1_loss(output, target)) / 2
        losses["id"] = self.identity(output, target, batch["maps"])
        weights = {
            "pixel": c.lambda_pixel,
            "perceptual": c.lambda_perceptual,
            "adversarial": c.lambda_adversarial,
            "discriminator": 1.0,
            "id": p.lambda_id,
        }
        loss = p.lambda_latent * latent + sum(weights[name] * value for name, value in losses.items())
        return {"loss": loss, "latent": latent, **losses}

    def taps(self, references: torch.Tensor) -> dict[str, Tap]:
        """Return the blocks on the features of references (B, R, C, h, w), which are side by side."""
        b, r = references.shape[:2]
        with torch.no_grad():
            subject = self.text_encoder(self.subject_ids, self.token).expand(b * r, -1, -1)
            seen = reference_pass(
                self.unet, self.structure_encoder, references.flatten(0, 1), subject, self.blocks.layers
            )
        torch.clear_autocast_cache()  # weights that were cast without gradients must not be used with gradients
        features = {layer: s.features.unflatten(0, (b, r)).flatten(1, 2) for layer, s in seen.items()}
        return {block.layer: partial(block, reference=features[block.layer]) for block in self.blocks}

    def identity(self, output: torch.Tensor, target: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Squared distance of embeddings over the images with a face (B, 2, 3); 0 without any."""
        seen = maps.isfinite().all(2).all(1)
        if self.recognizer is None or not seen.any():
            return output.new_zeros(())
        with torch.no_grad():
            original = self.recognizer(cut_faces((target[seen] + 1) / 2, maps[seen])).float()
        restored = self.recognizer(cut_faces((output[seen] + 1) / 2, maps[seen])).float()
        return (restored - original).square().sum(1).mean()


def cut(maps: torch.Tensor, corners: torch.Tensor, side: int) -> torch.Tensor:
    """Cut a square from each map (B, C, H, W); corners: (B, 2), top and left."""
    return torch.stack([m[:, y : y + side, x : x + side] for m, (y, x) in zip(maps, corners.tolist(), strict=True)])


@torch.no_grad()
def copy_layers(unet: RestorationUNet, blocks: PersonalizationBlocks, scales: Mapping[str, float]) -> None:
    """Initialise the blocks with the UNet's own layers and open their gates a little.

    Both attentions start as the self-attention of the layer that the block follows: it compares features of an image
    with each other, so it compares them with a reference as well. The block works on the features outside of that
    layer, so its matrices are products with the layer's projections. scales: standard deviation of the features by
    layer, because the features of a reference are not normalised.
    """
    for block in blocks:
        layer: Any = unet.get_submodule(block.layer)
        new: Any = block.block
        own = layer.transformer_blocks[-1]
        entry, last = layer.proj_in.weight, layer.proj_out.weight
        for attention, scale in ((new.attn1, 1.0), (new.attn2, scales[block.layer])):
            attention.to_q.weight.copy_(own.attn1.to_q.weight @ entry)
            attention.to_k.weight.copy_(own.attn1.to_k.weight @ entry / scale)
            attention.to_v.weight.copy_(own.attn1.to_v.weight @ entry / scale)
            attention.to_out[0].weight.copy_(last @ own.attn1.to_out[0].weight)
            attention.to_out[0].bias.copy_(last @ own.attn1.to_out[0].bias)
        new.ff.net[0].proj.weight.copy_(own.ff.net[0].proj.weight @ entry)
        new.ff.net[0].proj.bias.copy_(own.ff.net[0].proj.bias)
        new.ff.net[2].weight.copy_(last @ own.ff.net[2].weight)
        new.ff.net[2].bias.copy_(last @ own.ff.net[2].bias)
        block.gamma.fill_(INITIAL_GAMMA)


@torch.no_grad()
def feature_scales(base: Base, latents: torch.Tensor) -> dict[str, float]:
    """Return the standard deviation of the features of undegraded latents (B, C, h, w), by layer."""
    context = base.encode_prompt().expand(len(latents), -1, -1)
    seen = reference_pass(base.unet, base.structure_encoder, latents, context, base.config.layers)
    return {layer: float(s.features.float().std()) for layer, s in seen.items()}


class PeopleSampler:
    """Draws samples with references of the same person, as a pure function of (seed, number)."""

    def __init__(self, pool: Arrays, latents: npt.NDArray[Any], config: PriorConfig) -> None:
        self.pool, self.latents, self.config = pool, latents, config
        self.person, self.photo = np.array(pool["person"]), np.array(pool["photo"])

    def __call__(self, number: int) -> Batch:
        """Return batch `number` of `PriorObjective.with_references`."""
        c, settings = self.config, self.config.base.train
        rng = np.random.default_rng([settings.seed, 37, number])
        tiles, versions = self.latents.shape[:2]
        chosen = rng.integers(0, tiles, c.people), rng.integers(0, versions, c.people)
        pairs, count = list(zip(*chosen, strict=True)), int(rng.integers(1, c.references + 1))
        size, side = self.latents.shape[-1], c.crop + 2 * MARGIN
        faces = [self.face(k, v) for k, v in pairs]
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

    def references(self, tile: int, count: int, rng: np.random.Generator) -> torch.Tensor:
        """Draw latents (count, C, h, w) of other photographs of the person in a tile, undegraded."""
        others = np.flatnonzero((self.person == self.person[tile]) & (self.photo != self.photo[tile]))
        rows = rng.choice(others, count, replace=len(others) < count)
        versions = rng.integers(0, self.latents.shape[1], count)
        return torch.from_numpy(self.latents[rows, versions, 0]).float()

    def face(self, tile: int, version: int) -> npt.NDArray[Any]:
        """Return the map (2, 3) of a tile's face; the map is mirrored for a flipped version."""
        found: npt.NDArray[Any] = np.array(self.pool["maps"][tile], float)
        if is_flipped(version):
            found[0] = -found[0]
        return found


def around(
    face: npt.NDArray[Any], side: int, size: int, spread: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw the corner of a square about a face (2, 3) in a square of `size`; anywhere without a face.

    spread: largest distance of the centres, 1 is half the face.
    """
    if not np.isfinite(face).all():
        return rng.integers(0, size - side + 1, 2)
    x, y = face @ np.array([*rng.uniform(-spread, spread, 2), 1.0])
    corner = np.round((np.array([y, x]) + 1) / 2 * size - side / 2)
    return np.clip(corner, 0, size - side).astype(np.int64)


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
        face = FaceRecognizer(recognizer) if recognizer and config.lambda_id else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            scales = feature_scales(base, torch.from_numpy(encoded[0][:8, 0, 0]).float())
            objective = PriorObjective(base, config, Lpips(lpips), face, scales)
        known, plain = PeopleSampler(people, encoded[0], config), WindowSampler(tiles, encoded[1], config.base)

        def make_batch(_: int, number: int) -> Batch:
            return {**plain(number), **{f"person_{name}": value for name, value in known(number).items()}}

        training = Training(
            "prior",
            objective,
            make_batch,
            settings,
            work / "prior.pt",
            signature([asdict(config), base.fingerprint, [list(latents.shape) for latents in encoded]], []),
            parameter_groups(objective, base, config),
            on_log=log_to(work / "prior.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
    base.prior = Prior(base.unet, base.config)
    base.prior.blocks.load_state_dict(objective.blocks.state_dict())
    base.prior.token.data.copy_(objective.token.data)
    base.freeze()
    base.fingerprint = fingerprint_modules(base.modules())


def parameter_groups(objective: PriorObjective, base: Base, config: PriorConfig) -> list[ParameterGroup]:
    """Return the groups of the optimizer: base, blocks, gamma and token, discriminator."""
    assert base.cfw is not None
    trained = [base.unet, base.structure_encoder, base.text_encoder, base.cfw, base.vae.decoder]
    gammas = [block.gamma for block in objective.blocks]
    own = {id(gamma) for gamma in gammas}
    blocks = [p for p in objective.blocks.parameters() if id(p) not in own]
    groups: list[ParameterGroup] = [
        {"params": [p for m in trained for p in m.requires_grad_(True).parameters()]},
        {"params": blocks, "lr": config.learning_rate},
        {"params": [*gammas, objective.token], "lr": config.gamma_learning_rate},
    ]
    if objective.discriminator is not None:
        rate = config.base.discriminator_rate
        groups.append({"params": list(objective.discriminator.parameters()), "lr": rate})
    return groups
