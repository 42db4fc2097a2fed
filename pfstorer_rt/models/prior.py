"""The prior of a base: personalization blocks that were trained on many people, with which an identity starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from pfstorer_rt.base_files import PRIOR, is_instant
from pfstorer_rt.config import BaseConfig
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.models.personalization import PersonalizationBlocks, build_blocks
from pfstorer_rt.models.unet import RestorationUNet

FOLDER, FILE = PRIOR.parent.name, PRIOR.name
"""Folder of the prior in a base directory, and its file."""
EMBEDDING, SPREAD = 128, 0.1
"""Length of a face's embedding (dlib), and standard deviation of its values among people, about."""


class FaceShifts(nn.Module):
    """What a face's embedding adds to the biases of the blocks: a linear map for the feed-forward layer of each block.

    The biases of an identity are constant, so the embedding takes no time when an image is restored.
    """

    mean: torch.Tensor

    def __init__(self, blocks: PersonalizationBlocks) -> None:
        """Build maps that return zeros, around a zero mean."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(EMBEDDING))
        maps = [nn.Linear(EMBEDDING, first_bias(block).numel(), bias=False) for block in blocks]
        for linear in maps:
            nn.init.zeros_(linear.weight)
        self.maps = nn.ModuleList(maps)

    def forward(self, faces: torch.Tensor) -> list[torch.Tensor]:
        """Map embeddings (B, 128) to a shift (B, W) for each block; the mean embedding has zero shifts."""
        normalized = (faces - self.mean) / SPREAD
        return [linear(normalized) for linear in self.maps]


def first_bias(block: nn.Module) -> nn.Parameter:
    """Return the bias of the first feed-forward layer of a personalization block."""
    return cast(nn.Parameter, cast(Any, block).block.ff.net[0].proj.bias)


class Prior(nn.Module):
    """The blocks and the token with which the training of an identity starts."""

    def __init__(self, unet: RestorationUNet, config: BaseConfig, instant: bool = True) -> None:
        """Build untrained blocks at the base's layers, and a zero token.

        instant: whether the blocks use the references of a person without further training (`training.prior`), or are
        the start of a training (`training.reptile`).
        """
        super().__init__()
        self.instant = instant
        self.blocks = build_blocks(unet, config.layers, config.head_size)
        self.token = nn.Parameter(torch.zeros(config.text["hidden_size"]))
        self.shifts = FaceShifts(self.blocks)

    @torch.no_grad()
    def copy_to(self, blocks: PersonalizationBlocks, face: torch.Tensor | None = None) -> None:
        """Give blocks the weights of the prior for a person; face: the person's embedding (128,), None if unknown."""
        blocks.load_state_dict(self.blocks.state_dict())
        if face is not None:
            for block, shift in zip(blocks, self.shifts(face.float()[None].to(self.shifts.mean.device)), strict=True):
                first_bias(block).add_(shift[0])

    @property
    def has_shifts(self) -> bool:
        """Whether the embedding of a face changes the blocks."""
        return any(bool(p.any()) for p in self.shifts.parameters())

    def save(self, folder: Path) -> None:
        """Write the tensors in fp16 to `FILE` in a new folder; shifts that are zero are left out."""
        folder.mkdir()
        shown = self.state_dict() if self.has_shifts else self.without_shifts()
        tensors = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in shown.items()}
        metadata = {"format": "pt", "instant": str(self.instant)}
        (folder / FILE).write_bytes(safetensors.torch.save(tensors, metadata))

    def without_shifts(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the blocks and of the token."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("shifts.")}

    @classmethod
    def load(cls, folder: Path, unet: RestorationUNet, config: BaseConfig) -> Prior | None:
        """Read the prior of a base; None without a file. Raises `BadFileError` for tensors that do not fit the base."""
        if not (folder / FILE).is_file():
            return None
        with safe_open(folder / FILE, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            instant = is_instant(file.metadata())
        prior = cls(unet, config, instant)
        plain = not any(name.startswith("shifts.") for name in tensors)
        expected = prior.without_shifts() if plain else prior.state_dict()
        wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
            raise BadFileError(f"{folder.name}/{FILE}: tensors for other layers; expected the layers of this base")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise BadFileError(f"{folder.name}/{FILE}: values that are not finite")
        prior.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=not plain)
        return prior
