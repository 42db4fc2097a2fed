"""Train a base on photographs: an autoencoder, then a restorer on pairs of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator

from pfstorer_rt.config import PRESETS, TrainConfig, Weighting
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import Base, build_base, fingerprint_modules
from pfstorer_rt.models.vae import Autoencoder, build_vae
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Samples, make_arrays
from pfstorer_rt.training.crops import PAIR_CHUNK, CropConfig, pair_maker, pairs_signature, split_holdout
from pfstorer_rt.training.data import Batch, Photographs, draw_timesteps
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.loop import MakeBatch, Training, log_to, run_training, signature
from pfstorer_rt.training.objectives import AutoencoderObjective, RestorerObjective

AUTOENCODER = TrainConfig(iterations=6000, batch=16, learning_rate=4e-4, warmup=100, decay=0.5, ema=0.998)
RESTORER = TrainConfig(iterations=8000, batch=16, learning_rate=5e-4, warmup=200, decay=0.4, ema=0.999)


@dataclass(frozen=True)
class BaseTrainConfig:
    """Settings of the stage `base`: the autoencoder, then the restorer. The base `tiny` started from these defaults.

    With a prior, the restorer alone is trained.
    """

    preset: str = "portrait"
    autoencoder: TrainConfig = AUTOENCODER
    restorer: TrainConfig = RESTORER
    crops: CropConfig = field(default_factory=CropConfig)
    crop: int = 128
    """Side in pixels of the autoencoder's training crops (it is convolutional, so any size works)."""
    latent_crop: int = 16
    """Side of the latent crops in the first part of the restorer's training, at a third of the cost of tiles of 24."""
    cropped: float = 0.8
    """Share of the iterations on latent crops; the others use whole tiles."""
    first_step: float = 0.0
    """Share of the samples at timestep 999, where sampling starts: it matters most for few-step sampling."""
    weighting: Weighting = "prediction"
    """Measure the restorer's error in the network's prediction, or in the clean latent that follows from it."""
    weights: Literal["all", "conditions"] | None = None
    """Weights of the restorer that are trained: all, or only SPADEs and structure encoder (`conditions`).

    None is `conditions` with a prior and `all` without."""


def train_autoencoder(
    paths: list[Path], work: Path, config: BaseTrainConfig, on_progress: OnProgress = ignore_progress
) -> Autoencoder:
    """Train the preset's autoencoder on random crops; resumes from `work/autoencoder.pt`."""
    settings, preset = config.autoencoder, PRESETS[config.preset]
    photos = Photographs(paths, settings.seed)
    side = config.crop // preset.factor

    def make_batch(_: int, number: int) -> Batch:
        first = number * settings.batch
        numbers = range(first, first + settings.batch)
        crops = [photos.crop(k, config.crop, config.crops.zoom, config.crops.wide)[0] for k in numbers]
        noise = torch.Generator().manual_seed(settings.seed * 1_000_003 + first)
        shape = (settings.batch, preset.latent_channels, side, side)
        return {"image": torch.stack(crops) * 2 - 1, "noise": torch.randn(shape, generator=noise)}

    with accelerated(settings) as accelerator:
        vae = build_vae(preset.vae)
        training = Training(
            "autoencoder",
            AutoencoderObjective(vae),
            make_batch,
            settings,
            work / "autoencoder.pt",
            signature([asdict(settings), config.preset, config.crop, config.crops.zoom, config.crops.wide], paths),
            on_log=log_to(work / "autoencoder.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
    return vae.eval().requires_grad_(False)


def latent_pairs(
    paths: list[Path],
    base: Base,
    work: Path,
    config: BaseTrainConfig,
    accelerator: Accelerator,
    on_progress: OnProgress = ignore_progress,
    size: int = PAIR_CHUNK,
) -> np.ndarray[Any, Any]:
    """Make (hq, lq) latents of degraded crops once; returns a memory map (pairs, 2, C, h, w) of fp16.

    Pair k shows photograph `order(k)` and depends only on the seed and k. size: pairs that are made and written at
    once.
    """
    settings, tile, side = config.restorer, base.config.tile, base.config.latent_tile
    count = len(paths) * config.crops.variations
    size = min(size, count)

    def encode(chunk: Batch) -> Mapping[str, np.ndarray[Any, Any]]:
        with torch.no_grad(), accelerator.autocast():
            images = (chunk[k].to(base.device, memory_format=torch.channels_last) for k in ("hq", "lq"))
            return {"pairs": torch.stack([base.encode(image) for image in images], 1).half().cpu().numpy()}

    samples = Samples(
        "pairs",
        {"pairs": (np.float16, (2, base.config.latent_channels, side, side))},
        count,
        size,
        pairs_signature(paths, tile, config.crops, settings.seed) + base.fingerprint,
        pair_maker(paths, tile, config.crops, settings.seed, size),
        encode,
        settings.workers,
    )
    return make_arrays(samples, work, on_progress)["pairs"]


def train_restorer(
    paths: list[Path], base: Base, work: Path, config: BaseTrainConfig, on_progress: OnProgress = ignore_progress
) -> None:
    """Train UNet, structure encoder and prompt encoder on latent pairs; resumes from `work/restorer.pt`.

    With `weights="conditions"` the UNet, a diffusion prior already, stays frozen except for its SPADEs (StableSR
    section 3.1).
    """
    settings, everything = config.restorer, config.weights != "conditions"
    with accelerated(settings, base) as accelerator:
        pairs = latent_pairs(paths, base, work, config, accelerator, on_progress)
        objective = RestorerObjective(base, config.weighting)
        for name, parameter in objective.named_parameters():
            parameter.requires_grad_(everything or ".spade." in name or name.startswith("structure_encoder"))
        training = Training(
            "restorer",
            objective,
            latent_batches(pairs, base, config),
            settings,
            work / "restorer.pt",
            signature(asdict(config), paths) + base.fingerprint,
            # On a CPU, torch 2.13 crashes in GroupNorm's backward pass when the weights need a gradient and a
            # channels-last input does not. The first SPADE of a frozen prior has such an input.
            channels_last=everything,
            on_log=log_to(work / "restorer.csv"),
            on_progress=on_progress,
        )
        run_training(training, accelerator)
    base.freeze()


def latent_batches(pairs: np.ndarray[Any, Any], base: Base, config: BaseTrainConfig) -> MakeBatch:
    """Return the function that draws the restorer's batches from latent pairs (N, 2, C, h, w)."""
    settings = config.restorer

    def make_batch(iteration: int, number: int) -> Batch:
        first = number * settings.batch
        rng = np.random.default_rng([settings.seed, 3, first])
        chosen = torch.from_numpy(pairs[np.sort(rng.choice(len(pairs), settings.batch, replace=False))]).float()
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + first)
        noise = torch.randn(chosen[:, 0].shape, generator=generator)
        t = draw_timesteps(settings.batch, config.first_step, generator)
        if iteration < config.cropped * settings.iterations:
            side = min(config.latent_crop, base.config.latent_tile)
            y, x = rng.integers(0, chosen.shape[-1] - side + 1, 2)
            chosen, noise = (z[..., y : y + side, x : x + side] for z in (chosen, noise))
        return {"hq": chosen[:, 0], "lq": chosen[:, 1], "noise": noise, "t": t}

    return make_batch


def train_base(
    sources: Sequence[Path],
    out: Path,
    config: BaseTrainConfig,
    work: Path,
    prior: Base | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Base:
    """Train a base on photographs and write it to `out` in fp16.

    sources: photographs, or folders of them; the share `config.crops.holdout` of them is left out. work: folder of the
    checkpoints; the same call resumes from them. prior: a base whose autoencoder and UNet are kept or trained
    further, according to `config.weights`; it is changed in place.
    """
    paths, _ = split_holdout(find_images(sources), config.crops.holdout)
    make_folder(work, private=True)
    if prior is None:
        base = build_base(config.preset, config.restorer.seed)
        base.vae = train_autoencoder(paths, work, config, on_progress)
        base.fingerprint = fingerprint_modules(base.modules())
    else:
        base = prior
    if config.weights is None:
        config = replace(config, weights="all" if prior is None else "conditions")
    train_restorer(paths, base, work, config, on_progress)
    base.save(out, torch.float16)
    return base
