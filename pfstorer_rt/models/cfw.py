"""Controllable feature wrapping: the decoder uses encoder features of the LQ image (StableSR section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from pfstorer_rt.models.vae import build_vae

Features = dict[int, torch.Tensor]
"""Encoder maps by level: level l has 1 / 2^l of the image's side."""
Encoded = tuple[torch.Tensor, torch.Tensor | None, Features]
"""Mean of a scaled latent, its standard deviation (None for a deterministic encoder), and the features."""
LEVELS = (1, 2)
"""Levels of the autoencoder that are wrapped."""


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, plus a shortcut; its 1x1 convolution changes the width.

    It computes the same as diffusers' ResnetBlock2D, with the tensor names of StableSR's checkpoint.
    """

    def __init__(self, entry: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, entry, eps=1e-6)
        self.conv1 = nn.Conv2d(entry, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(entry, width, 1) if entry != width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, entry, H, W) -> (B, width, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_out is None else self.conv_out(x))


class ResidualDenseBlock(nn.Module):
    """Five convolutions; each takes the outputs of all earlier ones (ESRGAN, Wang et al. 2018, section 3.1)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for i in range(1, 6):
            out = width if i == 5 else growth
            self.add_module(f"conv{i}", nn.Conv2d(width + (i - 1) * growth, out, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same."""
        seen = [x]
        for i in range(1, 5):
            seen.append(F.leaky_relu(self.get_submodule(f"conv{i}")(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * self.get_submodule("conv5")(torch.cat(seen, 1))


class RRDB(nn.Module):
    """Residual in residual dense block: three dense blocks (ESRGAN)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (ResidualDenseBlock(width, growth) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same."""
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class FusionLayer(nn.Module):
    """The addition to one level of the decoder: residual block, two RRDBs, residual block."""

    def __init__(self, width: int, growth: int, groups: int) -> None:
        super().__init__()
        self.encode_enc_1 = ResidualBlock(2 * width, width, groups)
        self.encode_enc_2 = nn.Sequential(RRDB(width, growth), RRDB(width, growth))
        self.encode_enc_3 = ResidualBlock(width, width, groups)

    def forward(self, encoded: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Maps of encoder and decoder, each (B, C, H, W) -> (B, C, H, W)."""
        return self.encode_enc_3(self.encode_enc_2(self.encode_enc_1(torch.cat([encoded, decoded], 1))))


class ControllableFeatureWrapping(ModelMixin, ConfigMixin):
    """The fusion layers, and the autoencoder that they were trained on if it differs from the base's."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        widths: tuple[int, ...] = (256, 512),
        growth: int = 32,
        norm_groups: int = 32,
        vae: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for level, width in zip(LEVELS, widths, strict=True):
            self.add_module(f"fusion_layer_{level}", FusionLayer(width, growth, norm_groups))
        self.autoencoder = build_vae(vae) if vae else None  # not named `vae`: a setting hides a module of the same name

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels whose maps the encoder passes to the decoder, finest first."""
        return LEVELS

    def encode(self, vae: AutoencoderKL, image: torch.Tensor) -> Encoded:
        """Encode (B, 3, H, W) in [-1, 1] to mean and standard deviation of the scaled posterior, and the features."""
        moments, features = encode(vae, image)
        if self.autoencoder is not None:  # trained on another autoencoder: the image is encoded twice
            features = self.features(vae, image)
        posterior, scale = DiagonalGaussianDistribution(moments), vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale, features

    def features(self, vae: AutoencoderKL, image: torch.Tensor) -> Features:
        """Encode (B, 3, H, W) in [-1, 1] to features; level l gives (B, C_l, H/2^l, W/2^l)."""
        return encode(self.autoencoder or vae, image)[1]

    def forward(
        self, vae: AutoencoderKL, latent: torch.Tensor, features: Features, weight: torch.Tensor | float
    ) -> torch.Tensor:
        """Decode a scaled latent (B, C, h, w) with the LQ image's features; weight 0 gives the plain decoder.

        At levels 2 and 1, after the residual blocks and before the upsampling: `h + weight * Fuse(features, h)`.
        """
        vae = self.autoencoder or vae
        decoder, top = vae.decoder, len(vae.decoder.up_blocks) - 1
        h = decoder.conv_in(vae.post_quant_conv(latent / vae.config.scaling_factor))
        h = decoder.mid_block(h)
        if isinstance(weight, torch.Tensor):
            weight = weight.to(h.dtype)
        for i, block in enumerate(decoder.up_blocks):
            for resnet in block.resnets:
                h = resnet(h, temb=None)
            if (level := top - i) in LEVELS:
                h = h + weight * self.get_submodule(f"fusion_layer_{level}")(features[level], h)
            for upsampler in block.upsamplers or ():
                h = upsampler(h)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))


def encode(vae: AutoencoderKL, image: torch.Tensor) -> tuple[torch.Tensor, Features]:
    """Encode (B, 3, H, W) in [-1, 1] to moments (B, 2C, h, w), unscaled, and the features of `LEVELS`.

    The features are taken after the residual blocks of a level, before the downsampling.
    """
    encoder, features = vae.encoder, {}
    h = encoder.conv_in(image)
    for level, block in enumerate(encoder.down_blocks):
        for resnet in block.resnets:
            h = resnet(h, temb=None)
        if level in LEVELS:
            features[level] = h
        for downsampler in block.downsamplers or ():
            h = downsampler(h)
    h = encoder.mid_block(h)
    h = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(h)))
    return vae.quant_conv(h), features
