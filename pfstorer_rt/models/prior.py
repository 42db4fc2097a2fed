"""The prior of a base: personalization blocks that learned from many people how to use references."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from pfstorer_rt.config import BaseConfig
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.models.personalization import build_blocks
from pfstorer_rt.models.unet import RestorationUNet

FOLDER = "personalization"
"""Folder of the prior in a base directory."""
FILE = "model.safetensors"


class Prior(nn.Module):
    """The blocks and the token with which the training of an identity starts."""

    def __init__(self, unet: RestorationUNet, config: BaseConfig) -> None:
        """Build untrained blocks at the base's layers, and a zero token."""
        super().__init__()
        self.blocks = build_blocks(unet, config.layers, config.head_size)
        self.token = nn.Parameter(torch.zeros(config.text["hidden_size"]))

    def save(self, folder: Path) -> None:
        """Write the tensors in fp16 to `FILE` in a new folder."""
        folder.mkdir()
        tensors = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in self.state_dict().items()}
        (folder / FILE).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))

    @classmethod
    def load(cls, folder: Path, unet: RestorationUNet, config: BaseConfig) -> Prior | None:
        """Read the prior of a base; None without a file. Raises `BadFileError` for tensors that do not fit the base."""
        if not (folder / FILE).is_file():
            return None
        tensors = safetensors.torch.load_file(folder / FILE)
        prior = cls(unet, config)
        wanted = {name: tuple(tensor.shape) for name, tensor in prior.state_dict().items()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
            raise BadFileError(f"{folder.name}/{FILE}: tensors for other layers; expected the layers of this base")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise BadFileError(f"{folder.name}/{FILE}: values that are not finite")
        prior.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return prior
