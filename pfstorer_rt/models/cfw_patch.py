"""Controllable feature wrapping for a `PatchAutoencoder` (StableSR section 3.3)."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from pfstorer_rt.models.cfw import Encoded, Features
from pfstorer_rt.models.cfw_tiny import BottleneckFusion
from pfstorer_rt.models.patch_autoencoder import PatchAutoencoder


class PatchFeatureWrapping(ModelMixin, ConfigMixin):
    """Controllable feature wrapping for a `PatchAutoencoder`, which is not changed.

    levels: wrapped levels; level l has 1 / 2^l of the image's side. widths: channels of each level's map. patch: the
    autoencoder's patch size. A level above the autoencoder's finest is possible: its maps are the images in patches of
    2^l pixels, with 3 * 4^l channels. It passes on the detail that the autoencoder loses, and smooths the borders
    between the autoencoder's patches.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, levels: tuple[int, ...] = (2, 3), widths: tuple[int, ...] = (64, 128), growth: int = 32, patch: int = 4
    ) -> None:
        super().__init__()
        self.finest = int(math.log2(patch))
        for level, width in zip(levels, widths, strict=True):
            self.add_module(f"fusion_layer_{level}", BottleneckFusion(width, growth))

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels whose maps the encoder passes to the decoder, finest first."""
        return tuple(self.config.levels)

    def layer(self, level: int) -> BottleneckFusion:
        """Return the fusion layer of a level."""
        found = self.get_submodule(f"fusion_layer_{level}")
        assert isinstance(found, BottleneckFusion)
        return found

    def encode(self, vae: PatchAutoencoder, image: torch.Tensor) -> Encoded:
        """Encode (B, 3, H, W) in [-1, 1] to the scaled latent, None for its standard deviation, and features by level.

        Level l gives (B, G, H/2^l, W/2^l): the narrowed map after the blocks of the level.
        """
        latent, coarse = vae.encoder(image)
        maps = {level: self.patches(image, level) for level in self.levels if level < self.finest}
        maps |= {self.finest + i: h for i, h in enumerate(coarse)}
        features = {level: self.layer(level).narrow_encoded(maps[level]) for level in self.levels}
        return latent * vae.config.scaling_factor, None, features

    def features(self, vae: PatchAutoencoder, image: torch.Tensor) -> Features:
        """Return only the features of `encode`."""
        return self.encode(vae, image)[2]

    def forward(
        self, vae: PatchAutoencoder, latent: torch.Tensor, features: Features, weight: torch.Tensor | float
    ) -> torch.Tensor:
        """Decode a scaled latent (B, C, h, w) with the LQ image's features; weight 0 gives the plain decoder.

        Before the blocks of each level, and on the image in patches: `h + weight * Fuse(features, h)`.
        """

        def fuse(level: int, h: torch.Tensor) -> torch.Tensor:
            share = weight.to(h.dtype) if isinstance(weight, torch.Tensor) else weight
            fused: torch.Tensor = share * self.layer(level)(features[level], h)
            return fused

        added = {level - self.finest: partial(fuse, level) for level in self.levels if level >= self.finest}
        image: torch.Tensor = vae.decoder(latent / vae.config.scaling_factor, added)
        for level in sorted((level for level in self.levels if level < self.finest), reverse=True):
            image = image + F.pixel_shuffle(fuse(level, self.patches(image, level)), 2**level)
        return image

    @staticmethod
    def patches(image: torch.Tensor, level: int) -> torch.Tensor:
        """Rearrange (B, 3, H, W) to patches (B, 3 * 4^l, H/2^l, W/2^l)."""
        return F.pixel_unshuffle(image, 2**level)
