"""`personalize`: learn one identity from a few photographs on a frozen base (PFStorer section 3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pfstorer_rt.attention import choose, training_backend
from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.files import make_folder, sha256_file
from pfstorer_rt.identity import Identity, named_identity
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.models.personalization import PersonalizationBlock
from pfstorer_rt.models.reference import reference_features
from pfstorer_rt.models.unet import RestorationUNet
from pfstorer_rt.training.base import signature
from pfstorer_rt.training.data import Batch, center_crop, find_images, random_crop, read_photo
from pfstorer_rt.training.degradation import LEVELS, degrade
from pfstorer_rt.training.loop import make_accelerator, train
from pfstorer_rt.training.losses import DreamBoothObjective, PersonalizationObjective
from pfstorer_rt.training.memory import make_adamw, saving_memory

ZOOM = 1.25
"""Training squares are cut at up to this magnification, so that most of the face stays in."""


def personalize(
    name: str,
    references: Sequence[Path],
    base: Base | str | Path = "tiny",
    config: PersonalizeConfig | None = None,
    output: Path | None = None,
) -> Identity:
    """Learn an identity and write its file.

    name: of the identity. references: photographs of one person, or folders of them; 3-5 are meant.
    base: a loaded base, a shipped name or a directory. output: the file; None is the named one in the
    user's data directory. A call that was interrupted goes on where it stopped.
    Raises `BadFileError` when a photograph cannot be read, before any training.
    """
    config = config or PersonalizeConfig()
    base = base if isinstance(base, Base) else load_base(base)
    target = output or named_identity(name)
    paths = find_images(references)
    photos = [read_photo(path) for path in paths]
    accelerator = make_accelerator(config.train)
    base.to(accelerator.device)
    objective: nn.Module = (
        DreamBoothObjective(base, config) if config.method == "dreambooth" else PersonalizationObjective(base, config)
    )
    nn.Module.to(objective, accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_attention(objective, base, training_backend(accelerator.device))
    mark = signature([asdict(config), base.fingerprint], paths)
    checkpoint = target.with_name(target.stem + ".training.pt")
    make_folder(checkpoint.parent)
    optimizer = make_optimizer(objective, config)
    batches = BatchMaker(photos, base, config, accelerator.process_index, accelerator.num_processes)
    with saving_memory(objective, config.train, accelerator):
        train(objective, optimizer, batches, config.train, accelerator, checkpoint, mark, f"personalize {name}")
    set_attention(objective, base, "auto")
    identity = make_identity(name, objective, base, config, paths, photos)
    if not all(bool(torch.isfinite(t).all()) for t in identity.tensors.values()):
        raise PFStorerError(f"{name}: training left values that are not finite; use a lower learning rate")
    if accelerator.is_main_process:
        identity.save(target)
        checkpoint.unlink(missing_ok=True)
    return identity


def set_attention(objective: nn.Module, base: Base, backend: str) -> None:
    """Send the attention of the base and of what is trained on it through a backend."""
    base.set_attention(backend)
    kernels = choose(backend, base.device, base.config.head_size).kernels
    for module in objective.modules():
        if isinstance(module, (PersonalizationBlock, RestorationUNet)):
            module.set_kernels(kernels)


def make_optimizer(objective: nn.Module, config: PersonalizeConfig) -> torch.optim.Optimizer:
    """Return AdamW with a learning rate of its own for gamma and the token, which also do not decay.

    Adam moves a parameter by at most about its rate a step, so gamma at the blocks' 5e-5 could not
    leave the neighbourhood of zero in 500 steps.
    """
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    gammas = [p for n, p in named.items() if n.endswith(".gamma")]
    tokens = [p for n, p in named.items() if n == "token"]
    rest = [p for n, p in named.items() if not n.endswith(".gamma") and n != "token"]
    groups = [
        {"params": rest, "lr": config.train.learning_rate, "weight_decay": config.train.weight_decay},
        {"params": gammas, "lr": config.gamma_learning_rate, "weight_decay": 0.0},
        {"params": tokens, "lr": config.token_learning_rate, "weight_decay": 0.0},
    ]
    return make_adamw([g for g in groups if g["params"]], config.train)


class BatchMaker:
    """Iteration -> batch: random targets, one random other photograph as the reference of each."""

    def __init__(
        self,
        photos: Sequence[torch.Tensor],
        base: Base,
        config: PersonalizeConfig,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.config, self.rank, self.processes = config, rank, processes
        self.photos = list(photos)
        self.tile, side = base.config.tile, base.config.latent_tile
        self.shape = (config.train.batch, base.config.latent_channels, side, side)
        self.level = replace(LEVELS[config.level], p_hq=config.p_hq)
        self.centered = [center_crop(photo, self.tile) * 2 - 1 for photo in self.photos]

    def __call__(self, iteration: int) -> Batch:
        """Return `hq lq reference` (B, 3, tile, tile) in [-1, 1], `noise`, `t` (B,), `self` bool ()."""
        seed, batch = self.config.train.seed, self.config.train.batch
        number = iteration * self.processes + self.rank
        rng = np.random.default_rng([seed, 4, number])
        samples = [self.sample(rng) for _ in range(batch)]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        # One draw for all processes: they have to run the same graph.
        use_self = np.random.default_rng([seed, 5, iteration]).random() < self.share_without_reference()
        stacked = {k: torch.stack([s[k] for s in samples]) for k in ("hq", "lq", "reference")}
        return stacked | {
            "noise": torch.randn(self.shape, generator=generator),
            "t": torch.randint(0, 1000, (batch,), generator=generator),
            "self": torch.tensor(use_self),
        }

    def share_without_reference(self) -> float:
        """Share of iterations in which the blocks see no reference."""
        return 1.0 if self.config.ref_source == "self" else self.config.p_self

    def sample(self, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Draw one target and its reference, another photograph where there is one."""
        i = int(rng.integers(len(self.photos)))
        others = [j for j in range(len(self.photos)) if j != i] or [i]
        j = others[int(rng.integers(len(others)))]
        hq = random_crop(self.photos[i], self.tile, rng, ZOOM)
        lq = degrade(hq, self.level, rng)
        return {"hq": hq * 2 - 1, "lq": lq * 2 - 1, "reference": self.centered[j]}


@torch.no_grad()
def make_identity(
    name: str, objective: nn.Module, base: Base, config: PersonalizeConfig, paths: Sequence[Path],
    photos: Sequence[torch.Tensor],
) -> Identity:  # fmt: skip
    """Collect what was learned, rounded to the fp16 that is stored, with the cached reference."""
    layers = tuple(config.layers or base.config.layers)
    identity = Identity(
        name, base.fingerprint, base.config.name, config.method, () if config.method == "dreambooth" else layers,
        json.loads(json.dumps(asdict(config))), tuple(sha256_file(path) for path in paths),
    )  # fmt: skip
    if isinstance(objective, DreamBoothObjective):
        identity.tensors = {f"unet.{k}": v.half().cpu() for k, v in objective.unet.state_dict().items()}
        return identity
    assert isinstance(objective, PersonalizationObjective)
    tensors = {f"blocks.{k}": v.half().cpu() for k, v in objective.blocks.state_dict().items()}
    tensors["token"] = objective.token.half().cpu()
    if config.ref_source != "self":
        tensors |= cache_reference(photos[choose_reference(photos)], tensors["token"], base, identity)
    identity.tensors = tensors
    identity.gamma = gamma_summary(tensors, layers)
    return identity


def cache_reference(
    photo: torch.Tensor, token: torch.Tensor, base: Base, identity: Identity
) -> dict[str, torch.Tensor]:
    """Return `reference.{i}` (S, C) fp16 and `mask.{i}` (S,) of one photograph (3, H, W) in [0, 1]."""
    image = (center_crop(photo, base.config.tile) * 2 - 1)[None].to(base.device)
    found = reference_features(
        base, base.encode(image), token.float().to(base.device), identity.settings, identity.layers
    )
    tensors = {}
    for i, layer in enumerate(identity.layers):
        tensors[f"reference.{i}"] = found.features[layer][0].half().cpu()
        tensors[f"mask.{i}"] = found.masks[layer][0].cpu()
    return tensors


def choose_reference(photos: Sequence[torch.Tensor]) -> int:
    """Pick the photograph most like the others by face embedding; the first without a face model."""
    from pfstorer_rt.evaluation.metrics import face_embedder

    embed = face_embedder()
    found = [embed(photo.permute(1, 2, 0).numpy()) for photo in photos] if embed else []
    faces: list[tuple[int, Any]] = [(i, e) for i, e in enumerate(found) if e is not None]
    if len(faces) < 2:
        return faces[0][0] if faces else 0
    distance = [sum(float(np.linalg.norm(a - b)) for _, b in faces) for _, a in faces]
    return faces[int(np.argmin(distance))][0]


def gamma_summary(tensors: dict[str, torch.Tensor], layers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean and largest |gamma| of every layer."""
    gammas = {layer: tensors[f"blocks.{i}.gamma"].float().abs() for i, layer in enumerate(layers)}
    return {k: {"mean": round(g.mean().item(), 6), "max": round(g.max().item(), 6)} for k, g in gammas.items()}
