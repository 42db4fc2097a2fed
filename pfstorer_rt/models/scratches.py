"""The network that finds damage in an image, and fills it."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from pfstorer_rt.models.patch_autoencoder import PatchDecoder, PatchEncoder

PATCH, WIDTHS, BLOCKS = 2, (24, 48, 72, 96), (1, 1, 1, 2)
"""Side of the patches, and channels and residual blocks of each level, finest first."""
MULTIPLE = PATCH * 2 ** (len(WIDTHS) - 1)
"""Both sides of an image are multiples of this many pixels."""


class ScratchNetwork(nn.Module):
    """A U-Net (Ronneberger et al. 2015) on patches: image -> opacity of the damage, and the image without it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PatchEncoder(PATCH, WIDTHS, BLOCKS, WIDTHS[-1])
        self.decoder = PatchDecoder(PATCH, WIDTHS, BLOCKS, WIDTHS[-1])
        self.decoder.conv_out = nn.Conv2d(WIDTHS[0], 4 * PATCH**2, 3, padding=1)
        nn.init.zeros_(self.decoder.conv_out.weight)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> logit of the opacity (B, 1, H, W), filled image (B, 3, H, W)."""
        latent, maps = self.encoder(image)
        skips = {i: partial(_skip, skipped=m) for i, m in enumerate(maps[:-1])}
        output = self.decoder(latent, skips)
        return output[:, :1], image + output[:, 1:]


def _skip(_: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    return skipped


class ScratchGraph(nn.Module):
    """The network as it is exported: opacity and filled image, both in the ranges in which they are used."""

    def __init__(self, network: ScratchNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> opacity (B, 1, H, W) in [0, 1], fill (B, 3, H, W) in [-1, 1]."""
        logit, fill = self.network(image)
        return logit.sigmoid(), fill.clamp(-1, 1)
