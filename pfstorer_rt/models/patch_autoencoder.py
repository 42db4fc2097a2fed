"""An autoencoder on patches: it rearranges pixels to channels, so that no convolution runs at full resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn


class PlainResidual(nn.Module):
    """`x + conv2(ReLU(conv1(x)))` (EDSR, Lim et al. 2017, section 3.1); the initial weights give the identity function.

    It has no normalization: with a norm over the image, a tile would differ from the same region of the whole image.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same."""
        return x + self.conv2(F.relu(self.conv1(x)))


def blocks(width: int, count: int) -> nn.Sequential:
    """Return `count` residual blocks in a row."""
    return nn.Sequential(*(PlainResidual(width) for _ in range(count)))


class PatchEncoder(nn.Module):
    """Pixels -> patches -> residual blocks, with half the resolution at each further level -> latent."""

    def __init__(self, patch: int, widths: tuple[int, ...], counts: tuple[int, ...], latent: int) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(patch)
        self.conv_in = nn.Conv2d(3 * patch**2, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(blocks(w, n) for w, n in zip(widths, counts, strict=True))
        self.downsamplers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """image (B, 3, H, W) -> latent (B, C, H/f, W/f), and the map after the blocks of each level, finest first."""
        h = self.conv_in(self.unshuffle(image))
        maps = []
        for i, level in enumerate(self.levels):
            h = level(h if i == 0 else self.downsamplers[i - 1](h))
            maps.append(h)
        return self.conv_out(h), maps


class PatchDecoder(nn.Module):
    """Latent -> residual blocks, with sub-pixel upsampling by 2 between the levels -> patches -> pixels."""

    def __init__(self, patch: int, widths: tuple[int, ...], counts: tuple[int, ...], latent: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.levels = nn.ModuleList(blocks(w, n) for w, n in zip(widths, counts, strict=True))
        self.upsamplers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2)) for a, b in pairwise(widths)
        )
        self.conv_out = nn.Conv2d(widths[0], 3 * patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(patch)

    def forward(
        self, latent: torch.Tensor, fuse: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] | None = None
    ) -> torch.Tensor:
        """latent (B, C, h, w) -> image (B, 3, h*f, w*f).

        fuse: index of a level (0 is the finest) -> function of the input of the level's blocks; the function's result
        is added to this input.
        """
        h = self.conv_in(latent)
        for i in reversed(range(len(self.levels))):
            if fuse and i in fuse:
                h = h + fuse[i](h)
            h = self.levels[i](h)
            if i:
                h = self.upsamplers[i - 1](h)
        image: torch.Tensor = self.shuffle(self.conv_out(h))
        return image


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Deterministic autoencoder of factor `patch * 2 ** (levels - 1)` for images in [-1, 1].

    encoder_blocks, decoder_blocks: number of residual blocks of each level, finest first.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        patch: int = 4,
        widths: tuple[int, ...] = (64, 128, 256),
        encoder_blocks: tuple[int, ...] = (1, 1, 2),
        decoder_blocks: tuple[int, ...] = (2, 2, 2),
        latent_channels: int = 32,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder = PatchEncoder(patch, widths, encoder_blocks, latent_channels)
        self.decoder = PatchDecoder(patch, widths, decoder_blocks, latent_channels)

    def encode(self, image: torch.Tensor) -> AutoencoderTinyOutput:
        """Encode (B, 3, H, W) in [-1, 1] to unscaled `latents` (B, C, H/f, W/f)."""
        return AutoencoderTinyOutput(latents=self.encoder(image)[0])

    def decode(self, latent: torch.Tensor) -> DecoderOutput:
        """Decode unscaled latents (B, C, h, w) to `sample` (B, 3, h*f, w*f), nominally in [-1, 1]."""
        return DecoderOutput(sample=self.decoder(latent))
