"""Controllable feature wrapping for AutoencoderTiny: StableSR's method (section 3.3) with smaller layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from pfstorer_rt.models.cfw import LEVELS, Encoded, Features


class BottleneckFusion(nn.Module):
    """The addition to one level of the decoder: narrow and add both maps, apply two convolutions, and widen.

    The encoder narrows its map, so that it passes little data to the decoder. The last convolution is initialized to
    zero, so untrained wrapping gives the plain decoder.
    """

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.narrow_encoded = nn.Conv2d(width, growth, 1)
        self.narrow_decoded = nn.Conv2d(width, growth, 1, bias=False)
        self.conv1 = nn.Conv2d(growth, growth, 3, padding=1)
        self.conv2 = nn.Conv2d(growth, growth, 3, padding=1)
        self.widen = nn.Conv2d(growth, width, 1)
        for parameter in self.widen.parameters():
            nn.init.zeros_(parameter)

    def forward(self, narrowed: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Narrowed encoder map (B, G, H, W) and decoder map (B, C, H, W) -> (B, C, H, W)."""
        h = F.relu(narrowed + self.narrow_decoded(decoded))
        h = F.relu(self.conv2(F.relu(self.conv1(h))))
        return self.widen(h)


class TinyFeatureWrapping(ModelMixin, ConfigMixin):
    """The fusion layers of an AutoencoderTiny; its encoder and decoder are not changed."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, widths: tuple[int, ...] = (64, 64), growth: int = 16) -> None:
        super().__init__()
        for level, width in zip(LEVELS, widths, strict=True):
            self.add_module(f"fusion_layer_{level}", BottleneckFusion(width, growth))

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels whose maps the encoder passes to the decoder, finest first."""
        return LEVELS

    def layer(self, level: int) -> BottleneckFusion:
        """Return the fusion layer of a level."""
        found = self.get_submodule(f"fusion_layer_{level}")
        assert isinstance(found, BottleneckFusion)
        return found

    def encode(self, vae: AutoencoderTiny, image: torch.Tensor) -> Encoded:
        """Encode (B, 3, H, W) in [-1, 1] to the scaled latent, None for its standard deviation, and features by level.

        Level l gives (B, G, H/2^l, W/2^l): the narrowed map after the blocks of the level, before the downsampling.
        """
        features, level, h = {}, 0, image.add(1).div(2)
        for module in vae.encoder.layers:
            if getattr(module, "stride", None) == (2, 2):
                if level in LEVELS:
                    features[level] = self.layer(level).narrow_encoded(h)
                level += 1
            h = module(h)
        return h * vae.config.scaling_factor, None, features

    def features(self, vae: AutoencoderTiny, image: torch.Tensor) -> Features:
        """Return only the features of `encode`."""
        return self.encode(vae, image)[2]

    def forward(
        self, vae: AutoencoderTiny, latent: torch.Tensor, features: Features, weight: torch.Tensor | float
    ) -> torch.Tensor:
        """Decode a scaled latent (B, C, h, w) with the LQ image's features; weight 0 gives the plain decoder.

        At levels 2 and 1, after the blocks and before the upsampling: `h + weight * Fuse(features, h)`.
        """
        h = torch.tanh(latent / vae.config.scaling_factor / 3) * 3
        level = sum(enlarges(module) for module in vae.decoder.layers)
        if isinstance(weight, torch.Tensor):
            weight = weight.to(h.dtype)
        for module in vae.decoder.layers:
            if enlarges(module):
                if level in LEVELS:
                    h = h + weight * self.layer(level)(features[level], h)
                level -= 1
            h = module(h)
        return h.mul(2).sub(1)


def enlarges(module: nn.Module) -> bool:
    """Whether this layer upsamples, which ends a level of the decoder."""
    return getattr(module, "scale_factor", None) == 2
