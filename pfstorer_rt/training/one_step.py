"""The last part of training a base: one step from the LQ latent, with losses on the decoded image.

The encoder is frozen. UNet, structure encoder, prompt encoder, feature wrapping and decoder are trained together. Image
losses are computed on windows, because the perceptual network costs more than everything else. Whole tiles are decoded
for the identity loss alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.faces.recognizer import FaceRecognizer
from pfstorer_rt.files import make_folder
from pfstorer_rt.models.base import Base, fingerprint_modules
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Arrays
from pfstorer_rt.training.data import Batch, draw_timesteps
from pfstorer_rt.training.device import accelerated, to_channels_last
from pfstorer_rt.training.discriminator import FeatureDiscriminator, discriminator_loss, generator_loss
from pfstorer_rt.training.image_loss import identity_loss, jitter
from pfstorer_rt.training.latents import encode_pool, flip, is_flipped, to_pixels
from pfstorer_rt.training.loop import Training, log_to, run_training, signature
from pfstorer_rt.training.losses import Losses, color_loss, repeated_error
from pfstorer_rt.training.lpips import Lpips, normalize
from pfstorer_rt.training.objectives import RestorerObjective
from pfstorer_rt.training.optimizers import ParameterGroup

EYES = ((0.66, 0.0, 0.0), (0.0, 0.165, -0.38), (0.0, 0.0, 1.0))
"""Map from the strip of the eyes to the square of the recognizer."""
STRIP = (64, 256)
"""Height and width in pixels of the strip, about the resolution of a face that fills a tile of 512 pixels."""
MARGIN = 1
"""Latent pixels around a window that are decoded with it and discarded, to avoid border effects of the decoder."""


@dataclass(frozen=True)
class OneStepConfig:
    """Settings of the one-step training on a pool of tiles."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            iterations=2500, batch=4, learning_rate=3e-4, warmup=50, decay=0.4, ema=0.995, weight_decay=0.0
        )
    )
    window: int = 10
    """Side in latent pixels of the windows for the image losses."""
    crop: int = 24
    """Side in latent pixels of the latent crops, which some iterations restore in place of whole tiles."""
    cropped: float = 0.5
    """Share of the iterations on latent crops; only the other iterations have an identity loss."""
    on_faces: float = 0.6
    """Share of the iterations whose windows lie on a face, if the tile has one."""
    clean: float = 0.1
    """Share of the iterations whose inputs are the original images, which the base has to leave unchanged."""
    first_step: float = 0.9
    """Share of the samples at timestep 999."""
    lambda_latent: float = 0.2
    """Weight of the squared error of the clean latent."""
    lambda_pixel: float = 0.8
    """Weight of L1."""
    lambda_color: float = 1.5
    """Weight of the colour loss."""
    lambda_perceptual: float = 1.0
    """Weight of LPIPS."""
    lambda_adversarial: float = 0.1
    """Weight of the adversarial loss; 0 trains without a discriminator."""
    lambda_id: float = 0.8
    """Weight of the identity loss; 0 needs no recognizer."""
    lambda_eyes: float = 0.5
    """Weight of L1 and LPIPS of the eyes, where errors are most visible."""
    lambda_repeated: float = 4.0
    """Weight of the error that repeats from latent pixel to latent pixel, as a grid of dots on hair does."""
    discriminator_rate: float = 4e-4
    """Learning rate of the discriminator."""


class OneStepObjective(RestorerObjective):
    """The weighted sum of L_x0, L1, LPIPS, L_G, L_id, and the losses of eyes, colours and repeated errors, plus L_D.

    L_D trains the discriminator alone, because its input is detached from the restorer. L_G trains the restorer alone,
    because the discriminator's weights are detached there. One backward pass and one optimizer therefore serve both.
    """

    eyes: torch.Tensor

    def __init__(self, base: Base, config: OneStepConfig, lpips: Lpips, recognizer: FaceRecognizer | None) -> None:
        super().__init__(base, "x0")
        assert base.cfw is not None
        self.config, self.vae, self.cfw, self.factor = config, base.vae, base.cfw, base.config.factor
        self.lpips, self.recognizer = lpips, recognizer
        self.register_buffer("eyes", torch.tensor(EYES), persistent=False)
        widths = [stage[-1].out_channels for stage in lpips.stages]  # type: ignore[index]
        self.discriminator = FeatureDiscriminator(widths) if config.lambda_adversarial else None

    def forward(self, batch: Batch) -> Losses:
        """Take latents `hq lq noise` (B, C, h, w), `t` (B,), and windows `hq_window lq_window` (B, 3, P, P) in [-1, 1].

        The windows begin at `corner` (2,) of the latents and include the margins. With `hq_tile lq_tile` (1, 3, S, S)
        and `maps` (1, 2, 3), the losses of faces are computed on the first sample's whole image, and L1, the
        colour loss and the repeated error there too.
        """
        c, x0, z_lq, t = self.config, batch["hq"], batch["lq"], batch["t"]
        restored = self.restore(x0, z_lq, batch["noise"], t)
        latent = F.mse_loss(restored, x0)
        top, left = batch["corner"].tolist()
        side, border = batch["lq_window"].shape[-1] // self.factor, MARGIN * self.factor
        part = restored[..., top : top + side, left : left + side]
        inner = (..., slice(border, -border), slice(border, -border))
        output, target = self.decode(part, batch["lq_window"])[inner], batch["hq_window"][inner]
        losses = self.image_losses(output, target)
        losses |= self.losses_of_means(output, target)
        if "hq_tile" in batch:
            whole, original, maps = self.decode(restored[:1], batch["lq_tile"]), batch["hq_tile"], batch["maps"]
            everywhere = {"pixel": F.l1_loss(whole, original), **self.losses_of_means(whole, original)}
            losses |= {name: (losses[name] + value) / 2 for name, value in everywhere.items()}
            if maps.isfinite().all():
                losses["id"] = self.identity(whole, original, maps)
                losses["eyes"] = self.difference_of_eyes(whole, original, maps)
        weights = self.weights(c.lambda_id)
        loss = c.lambda_latent * latent + sum(weights[name] * value for name, value in losses.items())
        missing = {name: latent.new_zeros(()) for name in weights if name not in losses}
        return {"loss": loss, "latent": latent, **{n: {**losses, **missing}[n] for n in weights}}

    def decode(self, latent: torch.Tensor, lq: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Decode latents (B, C, h, w) with the features of the LQ images (B, 3, H, W).

        weight: of the features, one number or (B, 1, 1, 1).
        """
        features = self.cfw.encode(self.vae, lq.contiguous(memory_format=torch.channels_last))[2]
        image: torch.Tensor = self.cfw(self.vae, latent, features, weight)
        return image.float()

    def image_losses(self, output: torch.Tensor, target: torch.Tensor) -> Losses:
        """Return L1, LPIPS and the adversarial losses between images (B, 3, P, P) in [-1, 1]."""
        made = normalize(self.lpips.features(output))
        with torch.no_grad():
            real = normalize(self.lpips.features(target))
        losses = {"pixel": F.l1_loss(output, target), "perceptual": self.lpips.between(made, real).mean()}
        if self.discriminator is not None:
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            losses["adversarial"] = generator_loss(functional_call(self.discriminator, frozen, (made,)))
            judged = self.discriminator([m.detach() for m in made])
            losses["discriminator"] = discriminator_loss(self.discriminator(real), judged)
        return losses

    def losses_of_means(self, output: torch.Tensor, target: torch.Tensor) -> Losses:
        """Return the colour loss and the repeated error between images (B, 3, H, W) in [-1, 1]."""
        repeated = repeated_error(output, target, self.factor)
        return {"color": color_loss(output, target), "repeated": repeated}

    def identity(self, output: torch.Tensor, target: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Return `identity_loss` of faces at `maps` (B, 2, 3); 0 without a recognizer."""
        if self.recognizer is None:
            return output.new_zeros(())
        return identity_loss(self.recognizer, output, target, maps)

    def difference_of_eyes(self, output: torch.Tensor, target: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Return L1 + LPIPS of the eyes of faces at `maps` (B, 2, 3) in images (B, 3, S, S) in [-1, 1]."""
        made, real = (cut_strips(images, maps @ self.eyes) for images in (output, target))
        with torch.no_grad():
            features = normalize(self.lpips.features(real))
        perceptual = self.lpips.between(normalize(self.lpips.features(made)), features).mean()
        return F.l1_loss(made, real) + perceptual

    def weights(self, lambda_id: float) -> dict[str, float]:
        """Return the weight of each loss on images."""
        c = self.config
        return {
            "pixel": c.lambda_pixel,
            "color": c.lambda_color,
            "perceptual": c.lambda_perceptual,
            "adversarial": c.lambda_adversarial,
            "discriminator": 1.0,
            "id": lambda_id,
            "eyes": c.lambda_eyes,
            "repeated": c.lambda_repeated,
        }


def cut_strips(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Cut strips (B, 3, 64, 256) at maps (B, 2, 3) from images (B, 3, S, S)."""
    grid = F.affine_grid(maps, [len(images), 3, *STRIP], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class WindowSampler:
    """Draws the batches of `OneStepObjective`, as a pure function of (seed, iteration)."""

    def __init__(self, pool: Arrays, latents: npt.NDArray[Any], config: OneStepConfig) -> None:
        self.pool, self.latents, self.config = pool, latents, config
        self.factor = pool["hq"].shape[1] // latents.shape[-1]

    def __call__(self, number: int) -> Batch:
        """Return batch `number`."""
        c, settings = self.config, self.config.train
        rng = np.random.default_rng([settings.seed, 29, number])
        (tiles, versions), size = self.latents.shape[:2], self.latents.shape[-1]
        rows = rng.integers(0, tiles, settings.batch), rng.integers(0, versions, settings.batch)
        whole = bool(rng.random() >= c.cropped)
        side = size if whole else min(c.crop, size)
        window = min(c.window + 2 * MARGIN, side)
        place = self.on_a_face(int(rows[0][0]), int(rows[1][0]), window, rng) if rng.random() < c.on_faces else None
        if place is None:
            place = rng.integers(0, size - window + 1, 2)
        low, high = np.maximum(0, place + window - side), np.minimum(place, size - side)
        y, x = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
        chosen = torch.from_numpy(self.latents[rows]).float()[..., y : y + side, x : x + side]
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        batch = {
            "hq": chosen[:, 0],
            "lq": chosen[:, 1],
            "noise": torch.randn(chosen[:, 0].shape, generator=generator),
            "t": draw_timesteps(settings.batch, c.first_step, generator),
            "corner": torch.from_numpy(place - [y, x]),
            **self.windows(rows, place * self.factor, window * self.factor),
        }
        if whole:
            batch |= self.whole(int(rows[0][0]), int(rows[1][0]), rng)
        if rng.random() < c.clean:
            batch |= {name.replace("hq", "lq"): value for name, value in batch.items() if name.startswith("hq")}
        return batch

    def windows(self, rows: tuple[npt.NDArray[Any], ...], place: npt.NDArray[Any], side: int) -> Batch:
        """Crop pairs of tiles to the windows at `place`."""
        top, left = place.tolist()
        cut = (slice(top, top + side), slice(left, left + side))
        pairs = list(zip(*rows, strict=True))
        hq = np.stack([flip(self.pool["hq"][k], v)[cut] for k, v in pairs])
        lq = np.stack([flip(self.pool["lq"][k, v], v)[cut] for k, v in pairs])
        return {"hq_window": to_pixels(hq), "lq_window": to_pixels(lq)}

    def whole(self, tile: int, version: int, rng: np.random.Generator) -> Batch:
        """Return a whole pair and the jittered map of its face."""
        maps = face_of(self.pool, tile, version)[None] @ jitter(1, rng)
        return {
            "hq_tile": to_pixels(flip(self.pool["hq"][tile], version)[None]),
            "lq_tile": to_pixels(flip(self.pool["lq"][tile, version], version)[None]),
            "maps": torch.from_numpy(maps.astype(np.float32)),
        }

    def on_a_face(self, tile: int, version: int, window: int, rng: np.random.Generator) -> npt.NDArray[Any] | None:
        """Draw the corner of a window centred on the face of a tile; None for a tile without a face."""
        found = face_of(self.pool, tile, version)
        return around(found, window, self.latents.shape[-1], 0.6, rng) if np.isfinite(found).all() else None


def face_of(pool: Arrays, tile: int, version: int) -> npt.NDArray[Any]:
    """Return the map (2, 3) of a tile's face; the map is mirrored for a flipped version."""
    found: npt.NDArray[Any] = np.array(pool["maps"][tile], float)
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


def trained_parameters(base: Base) -> list[nn.Parameter]:
    """Return the parameters of everything except the encoder, with their gradients switched on."""
    assert base.cfw is not None
    trained = [base.unet, base.structure_encoder, base.text_encoder, base.cfw, base.vae.decoder]
    return [p for module in trained for p in module.requires_grad_(True).parameters()]


def finish_in_one_step(
    pool: Arrays,
    base: Base,
    work: Path,
    config: OneStepConfig,
    lpips: Path,
    recognizer: Path | None,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """Train a base in place with losses on its restored images; resumes from `work/one_step.pt`.

    pool: from `tile_pool.make_pool`, with degraded versions. lpips: NPZ file of LPIPS's weights. recognizer: dlib's
    network, for the identity loss. Raises `BadFileError` for a base without feature wrapping.
    """
    if base.cfw is None:
        raise BadFileError(f"base {base.config.name!r} has no feature wrapping; expected a base with `cfw`")
    make_folder(work)
    settings = config.train
    with accelerated(settings, base) as accelerator:
        to_channels_last(base.vae)
        latents = encode_pool(pool, base, work, accelerator, settings.workers, on_progress)
        face = FaceRecognizer(recognizer) if recognizer and config.lambda_id else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            objective = OneStepObjective(base, config, Lpips(lpips), face)
        groups: list[ParameterGroup] = [{"params": trained_parameters(base)}]
        if objective.discriminator is not None:
            groups.append({"params": list(objective.discriminator.parameters()), "lr": config.discriminator_rate})
        sampler = WindowSampler(pool, latents, config)
        training = Training(
            "one step",
            objective,
            lambda _, number: sampler(number),
            settings,
            work / "one_step.pt",
            signature([asdict(config), base.fingerprint, list(latents.shape)], []),
            groups,
            on_log=log_to(work / "one_step.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
    base.freeze()
    base.fingerprint = fingerprint_modules(base.modules())
