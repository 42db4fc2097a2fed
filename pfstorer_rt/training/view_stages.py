"""The training of a base and its prior on a GPU in minutes: the tiles are made on the GPU while it trains.

1. The autoencoder alone, on undegraded tiles.
2. The personalization blocks alone, on latents.
3. Everything but the encoder together, with losses on images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.diffusion import LAST
from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.faces.recognizer import FaceRecognizer, cut_faces
from pfstorer_rt.files import make_folder
from pfstorer_rt.models.base import Base
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.autoencoder import AutoencoderConfig, PatchAutoencoderObjective
from pfstorer_rt.training.capture import CudaGraphs
from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.device import accelerated, kernels_for, to_channels_last
from pfstorer_rt.training.joint import (
    JointBatches,
    JointConfig,
    JointObjective,
    for_device,
    short_training,
)
from pfstorer_rt.training.loop import Training, log_to, read_state, run_training, signature
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.photo_store import PhotoStore
from pfstorer_rt.training.prior import ReferenceObjective, block_groups, feature_scales, keep_prior
from pfstorer_rt.training.view_batches import Layout, ViewBatches

PART = 32
"""Images that are encoded at once."""
HELD = 8
"""Iterations of the autoencoder that crop the same tiles."""


@dataclass(frozen=True)
class ViewStagesConfig:
    """Settings of the three stages."""

    autoencoder: AutoencoderConfig | None = field(
        default_factory=lambda: AutoencoderConfig(
            train=short_training(minutes=0.7, learning_rate=3e-4, decay=0.5, ema=0.995),
            noise=0.04,
            lambda_perceptual=0.4,
            patch=256,
            patches=32,
        )
    )
    """None leaves the autoencoder as it is."""
    matching: TrainConfig = field(default_factory=lambda: short_training(minutes=0.5, learning_rate=8e-4, decay=0.4))
    """Used for a base without an instant prior, whose blocks have learned this."""
    joint: JointConfig = field(default_factory=JointConfig)
    matching_batches: int = 51
    """Batches of tiles whose latents the blocks are trained on."""
    matching_gamma: float = 5.0
    """Learning rate of gamma on latents, as a multiple of the rate of the blocks."""
    answer: float = 0.15
    """Share of the iterations on latents whose references contain the original itself."""
    graphs: bool = False
    """Replay the iterations of the last stage as CUDA graphs; needs a GPU."""


def with_minutes(config: ViewStagesConfig, minutes: float, matching: bool = True) -> ViewStagesConfig:
    """Divide minutes among the stages in the proportions of the defaults; matching: whether there is this stage."""
    first, second, third = config.autoencoder, config.matching, config.joint.base.train
    parts = [0 if first is None else first.train.minutes, second.minutes if matching else 0, third.minutes]
    scale = minutes / sum(parts)
    if first is not None:
        first = replace(first, train=replace(first.train, minutes=scale * first.train.minutes))
    third = replace(third, minutes=scale * third.minutes)
    joint = replace(config.joint, base=replace(config.joint.base, train=third))
    return replace(config, autoencoder=first, matching=replace(second, minutes=scale * second.minutes), joint=joint)


def train_on_views(
    open_store: Callable[[torch.device], PhotoStore],
    base: Base,
    work: Path,
    config: ViewStagesConfig,
    lpips: Lpips,
    recognizer: FaceRecognizer,
    discriminator: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """Train a base and its prior in place; the same call resumes from the checkpoints in `work`.

    open_store: returns the photographs on a device. lpips, recognizer: networks of the losses. discriminator:
    checkpoint of an earlier training whose discriminator is used. Raises `BadFileError` for a base without feature
    wrapping, `MissingBackendError` for graphs without a GPU.
    """
    if base.cfw is None:
        raise BadFileError(f"base {base.config.name!r} has no feature wrapping; expected a base with `cfw`")
    make_folder(work)
    window = min(config.joint.base.window, base.config.latent_tile)
    config = replace(config, joint=replace(config.joint, base=replace(config.joint.base, window=window)))
    settings = config.joint.base.train
    with accelerated(settings, base) as accelerator:
        if config.graphs and accelerator.device.type != "cuda":
            raise MissingBackendError("CUDA graphs need an NVIDIA GPU, and PyTorch finds none; train without graphs")
        # A captured iteration must not read weights that were converted before the capture.
        accelerator.autocast_handler = AutocastKwargs(cache_enabled=not config.graphs)
        for module in base.modules().values():
            to_channels_last(module)
        stages = ViewStages(open_store(accelerator.device), base, work, config, accelerator, on_progress)
        if config.autoencoder is not None:
            stages.train_autoencoder(config.autoencoder, lpips)
        known = stages.make_blocks()
        if not base.instant:
            stages.train_matching(known)
        stages.train_jointly(known, lpips, recognizer, discriminator)
    keep_prior(base, known)


class ViewStages:
    """The stages, which share the photographs."""

    def __init__(
        self,
        store: PhotoStore,
        base: Base,
        work: Path,
        config: ViewStagesConfig,
        accelerator: Accelerator,
        on_progress: OnProgress,
    ) -> None:
        self.base, self.work, self.config, self.accelerator = base, work, config, accelerator
        self.on_progress, self.mark = on_progress, signature([asdict(config), base.fingerprint], [])
        self.views = ViewBatches(store, Layout.of(config.joint.base.train.batch, store.generated is not None))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, 3, S, S) in [-1, 1] to latents (B, C, h, w), fp32."""
        with self.accelerator.autocast():
            parts = images.contiguous(memory_format=torch.channels_last).split(PART)
            return torch.cat([self.base.encode(part) for part in parts]).float()

    def rng(self, *numbers: int) -> np.random.Generator:
        """Return the random generator of a purpose."""
        return np.random.default_rng([self.config.joint.base.train.seed, *numbers])

    def train_autoencoder(self, c: AutoencoderConfig, lpips: Lpips) -> None:
        """Train the autoencoder without features of a degraded image."""
        base = self.base
        base.vae.requires_grad_(True)
        groups = for_device([{"params": list(base.vae.parameters()), "lr": c.train.learning_rate}], base.device)
        crop = min(c.crop, self.views.store.size)
        held: dict[int, torch.Tensor] = {}

        def make_batch(_: int, number: int) -> Batch:
            if number // HELD not in held:
                held.clear()
                held[number // HELD] = self.views.originals(0, self.rng(47, number // HELD))[0] * 2 - 1
            tiles, rng = held[number // HELD], self.rng(53, number)
            rows = torch.from_numpy(rng.integers(0, len(tiles), c.train.batch)).to(base.device)
            y, x = (int(n) for n in rng.integers(0, self.views.store.size - crop + 1, 2))
            image = tiles[rows, :, y : y + crop, x : x + crop]
            side = crop // base.config.factor
            noise = self.noise((len(image), base.config.latent_channels, side, side), 53, number)
            return {"image": image, "noise": noise}

        self.run("autoencoder", PatchAutoencoderObjective(base.vae, c, lpips), make_batch, c.train, groups)
        base.vae.requires_grad_(False)

    def make_blocks(self) -> ReferenceObjective:
        """Return the objective on latents, which has the blocks."""
        base = self.base
        tiles, *_ = self.views.originals(0, self.rng(59))
        known = ReferenceObjective(base, feature_scales(base, self.encode(tiles[:8] * 2 - 1))).to(base.device)
        known.token.requires_grad_(False)
        base.set_attention(kernels_for(self.config.matching, base.device), known)
        return known

    def train_matching(self, known: ReferenceObjective) -> None:
        """Train the blocks on latents."""
        c, base, config = self.config.matching, self.base, self.config
        pairs, references = self.latents()

        def make_batch(_: int, number: int) -> Batch:
            rng = self.rng(61, number)
            rows = torch.from_numpy(rng.integers(0, len(pairs), c.batch)).to(base.device)
            chosen = references[rows, : int(rng.integers(1, references.shape[1] + 1))].float()
            hq, lq = pairs[rows].float().unbind(1)
            if rng.random() < config.answer:
                chosen[:, 0] = hq
            t = torch.full((len(hq),), LAST, device=base.device)
            return {"hq": hq, "lq": lq, "noise": self.noise(hq.shape, 61, number), "t": t, "references": chosen}

        groups = block_groups(
            known.blocks.requires_grad_(True), c.learning_rate, config.matching_gamma * c.learning_rate
        )
        self.run("matching", known, make_batch, c, for_device(groups, base.device))

    def latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode samples with references: latents (N, 2, C, h, w) of `hq` and `lq`, (N, R, C, h, w) of references."""
        known, most = self.views.layout.known, self.config.joint.references
        pairs, references = [], []
        for number in range(self.config.matching_batches):
            rng = self.rng(67, number)
            count = int(rng.integers(min(2, most), most + 1))
            made = self.views(count, 0.0, rng)
            pairs.append(torch.stack([self.encode(images[:known]) for images in (made.hq, made.lq)], 1).half())
            latents = self.encode(made.references.flatten(0, 1)).half().unflatten(0, (known, count))
            references.append(latents[:, [i % count for i in range(most)]])
        return torch.cat(pairs), torch.cat(references)

    def train_jointly(
        self, known: ReferenceObjective, lpips: Lpips, recognizer: FaceRecognizer, discriminator: Path | None
    ) -> None:
        """Train base, blocks and discriminator together."""
        c, base = self.config.joint, self.base
        objective = JointObjective(base, c, lpips, recognizer, known).to(base.device)
        if discriminator is not None:
            load_discriminator(objective, discriminator)

        def embed(references: torch.Tensor, faces: npt.NDArray[Any]) -> torch.Tensor:
            with self.accelerator.autocast():
                return mean_embeddings(recognizer, references, faces)

        if not known.shifts.mean.any():
            _, references, _, positions = self.views.originals(c.references, self.rng(71))
            known.shifts.mean.copy_(embed(references * 2 - 1, positions).mean(0))
        batches = JointBatches(self.views, self.encode, embed, known.shifts.mean, c)
        self.run("joint", objective, batches, c.base.train, objective.groups(base, c), self.config.graphs)

    def run(
        self,
        title: str,
        objective: nn.Module,
        make_batch: Callable[[int, int], Batch],
        settings: TrainConfig,
        groups: list[dict[str, object]],
        graphs: bool = False,
    ) -> None:
        """Run one stage, with its checkpoint and its losses in the work folder."""
        training = Training(
            title,
            objective,
            make_batch,
            settings,
            self.work / f"{title}.pt",
            self.mark,
            groups,
            recorder=CudaGraphs() if graphs else None,
            on_log=log_to(self.work / f"{title}.csv"),
            on_progress=self.on_progress,
        )
        run_training(training, self.accelerator)

    def noise(self, shape: tuple[int, ...], purpose: int, number: int) -> torch.Tensor:
        """Draw noise on the device."""
        device = self.base.device
        generator = torch.Generator(device).manual_seed(1_000_003 * number + purpose)
        return torch.randn(shape, generator=generator, device=device)


@torch.no_grad()
def mean_embeddings(recognizer: FaceRecognizer, references: torch.Tensor, faces: npt.NDArray[Any]) -> torch.Tensor:
    """Return the mean embeddings (B, 128) of references (B, R, 3, S, S) in [-1, 1] with faces at (B, R, 2, 3)."""
    maps = torch.from_numpy(faces.reshape(-1, 2, 3).astype(np.float32)).to(references.device)
    found = recognizer(cut_faces((references.flatten(0, 1) + 1) / 2, maps)).float()
    return found.unflatten(0, references.shape[:2]).mean(1)


def load_discriminator(objective: JointObjective, checkpoint: Path) -> None:
    """Copy the discriminator of a checkpoint of the stages `one-step`, `people` or `joint`.

    Raises `BadFileError` for a checkpoint without one.
    """
    state = read_state(checkpoint)["parameters"]
    start = "discriminator."
    tensors = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    if objective.discriminator is None or not tensors:
        raise BadFileError(f"{checkpoint}: no discriminator in this checkpoint; expected one of the stage one-step")
    objective.discriminator.load_state_dict(tensors)
