"""The time-aware structure encoder: LQ latent -> one feature map per UNet level (StableSR 3.1)."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D
from torch import nn

from pfstorer_rt.config import BaseConfig
from pfstorer_rt.models.unet import embed_time, to_map, to_tokens
from pfstorer_rt.ops import AttentionFn, AttentionProcessor, sdpa


class SpatialAttention(nn.Module):
    """GroupNorm, self-attention over pixels, residual."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.attn = Attention(channels, heads=heads, dim_head=channels // heads, bias=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return h + to_map(self.attn(to_tokens(self.norm(h))), h.shape[-2:])


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the level has it."""

    def __init__(self, entry: int, channels: int, blocks: int, temb: int, heads: int, groups: int) -> None:
        super().__init__()
        widths = [entry] + [channels] * blocks
        self.resnets = nn.ModuleList(residual(a, b, temb, groups) for a, b in pairwise(widths))
        attentions = [SpatialAttention(channels, heads, groups) if heads else nn.Identity() for _ in range(blocks)]
        self.attentions = nn.ModuleList(attentions)

    def forward(self, h: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """h (B, entry, H, W), temb (B, temb) -> (B, channels, H, W)."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(resnet(h, temb))
        return h


def residual(entry: int, channels: int, temb: int, groups: int) -> ResnetBlock2D:
    """Residual block with time embedding, eps 1e-5."""
    return ResnetBlock2D(in_channels=entry, out_channels=channels, temb_channels=temb, groups=groups, eps=1e-5)


class StructureEncoder(ModelMixin, ConfigMixin):
    """StableSR's `EncoderUNetModelWT`: the encoder half of a UNet, with all maps projected to one width.

    Every level has attention, except the deepest of four levels, as in StableSR.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        width: int = 256,
        multipliers: tuple[int, ...] = (1, 1, 2, 2),
        heads: int = 4,
        out_channels: int = 256,
        res_blocks: int = 2,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        temb = 4 * width
        widths = [width * m for m in multipliers]
        attended = [not (len(widths) == 4 and i == 3) for i in range(len(widths))]
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, temb)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        entries = [width, *widths[:-1]]
        self.levels = nn.ModuleList(
            Level(entry, w, res_blocks, temb, heads if a else 0, norm_groups)
            for entry, w, a in zip(entries, widths, attended, strict=True)
        )
        self.downsamplers = nn.ModuleList(Downsample2D(w, use_conv=True, padding=1, name="op") for w in widths[:-1])
        self.mid_in = residual(widths[-1], widths[-1], temb, norm_groups)
        self.mid_attention = SpatialAttention(widths[-1], heads, norm_groups)
        self.mid_out = residual(widths[-1], widths[-1], temb, norm_groups)
        self.taps = nn.ModuleList(residual(w, out_channels, temb, norm_groups) for w in widths)
        self.set_attention(sdpa)

    @classmethod
    def from_base_config(cls, config: BaseConfig) -> StructureEncoder:
        """Build an untrained encoder with the sizes of a base."""
        s = config.structure
        return cls(
            config.latent_channels,
            s.width,
            s.multipliers,
            s.heads,
            s.out_channels,
            s.res_blocks,
            s.norm_groups,
        )

    def set_attention(self, attention: AttentionFn) -> None:
        """Compute every attention layer with `attention`."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_processor(AttentionProcessor(attention))

    def forward(self, z_lq: torch.Tensor, t: torch.Tensor) -> dict[int, torch.Tensor]:
        """z_lq (B, C, h, w), t (B,) in 0..999 -> {w: (B, out, h, w), w/2: ..., ...}, one map per level."""
        temb = embed_time(self.time_proj, self.time_embedding, t).to(z_lq.dtype)
        h = self.conv_in(z_lq)
        maps: dict[int, torch.Tensor] = {}
        for i, level in enumerate(self.levels):
            h = level(h, temb)
            if i < len(self.downsamplers):
                maps[h.shape[-1]] = self.taps[i](h, temb)
                h = self.downsamplers[i](h)
        h = self.mid_out(self.mid_attention(self.mid_in(h, temb)), temb)
        maps[h.shape[-1]] = self.taps[-1](h, temb)
        return maps
