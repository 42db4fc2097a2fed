"""The restorer: diffusers' UNet with a SPADE on the output of every residual block's conv2 (StableSR 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from pfstorer_rt.config import BaseConfig
from pfstorer_rt.ops import AttentionProcessor, Kernels

StructureMaps = Mapping[int, torch.Tensor]
"""Structure maps by width: {w: (B, out_channels, h, w)}."""
Tap = Callable[[torch.Tensor], torch.Tensor]
"""Changes the tokens (B, L, C) of one spatial transformer."""


class Spade(nn.Module):
    """`n * (1 + gamma(a)) + beta(a)` with `n = GroupNorm(h)`, `a = ReLU(conv(s))` (method: SPADE).

    Names follow StableSR's checkpoint; `param_free_norm` is affine there despite its name.
    """

    def __init__(self, channels: int, map_channels: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.param_free_norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.mlp_shared = nn.Sequential(nn.Conv2d(map_channels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)
        self.kernels = Kernels()

    def forward(self, h: torch.Tensor, structure: torch.Tensor) -> torch.Tensor:
        """h (B, C, H, W), structure (B, map_channels, H, W) -> (B, C, H, W)."""
        a = self.mlp_shared(structure)
        return self.kernels.spade_norm(self.param_free_norm, h, self.mlp_gamma(a), self.mlp_beta(a))


class RestorationUNet(UNet2DConditionModel):
    """UNet2DConditionModel with a child module `spade` in every residual block.

    It has its own forward, because diffusers has no argument for the structure maps and for the taps after spatial
    transformers (personalization blocks).
    """

    def __init__(self, *, map_channels: int = 256, spade_hidden: int = 128, **config: Any) -> None:
        super().__init__(**config)
        self.register_to_config(map_channels=map_channels, spade_hidden=spade_hidden, **config)
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                groups = module.norm2.num_groups
                module.spade = Spade(module.out_channels, map_channels, spade_hidden, groups)
        self.set_kernels(Kernels())

    @classmethod
    def from_base_config(cls, config: BaseConfig) -> RestorationUNet:
        """Build an untrained UNet with the sizes of a base."""
        sizes = {"map_channels": config.structure.out_channels, "spade_hidden": config.spade_hidden}
        return cls(**sizes, sample_size=config.latent_tile, **config.unet)

    def set_kernels(self, kernels: Kernels) -> None:
        """Compute every attention and every normalization of a residual block with `kernels`."""
        self.kernels = kernels
        self.set_attn_processor(AttentionProcessor(kernels.attention))
        for module in self.modules():
            if isinstance(module, Spade):
                module.kernels = kernels

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        structure: StructureMaps,
        taps: Mapping[str, Tap] | None = None,
    ) -> torch.Tensor:
        """Predict eps or v.

        x: noisy latent (B, C, h, w), sides multiples of 2^(levels - 1). t: (B,) in 0..999.
        context: prompt (B, L, D). structure: {width: map}. taps: {spatial transformer: change of its output tokens}.
        Returns (B, C, h, w).
        """
        recompute = torch.is_grad_enabled() and self.is_gradient_checkpointing
        run = _Run(self.kernels, context, structure, taps or {}, recompute)
        temb = embed_time(self.time_proj, self.time_embedding, t).to(x.dtype)
        h = self.conv_in(x)
        skips = [h]
        for i, block in enumerate(self.down_blocks):
            for j, resnet in enumerate(block.resnets):
                h = run.level(block, f"down_blocks.{i}", j, resnet, h, temb)
                skips.append(h)
            for downsample in block.downsamplers or ():
                h = downsample(h)
                skips.append(h)
        h = run.resnet(self.mid_block.resnets[0], h, temb)
        for j, (attn, resnet) in enumerate(zip(self.mid_block.attentions, self.mid_block.resnets[1:], strict=True)):
            h = run.resnet(resnet, run.transformer(f"mid_block.attentions.{j}", attn, h), temb)
        for i, block in enumerate(self.up_blocks):
            for j, resnet in enumerate(block.resnets):
                h = run.level(block, f"up_blocks.{i}", j, resnet, torch.cat([h, skips.pop()], 1), temb)
            for upsample in block.upsamplers or ():
                h = upsample(h)
        return self.conv_out(self.conv_act(self.conv_norm_out(h)))


@dataclass(frozen=True)
class _Run:
    """One forward pass, with the inputs that all levels share."""

    kernels: Kernels
    context: torch.Tensor
    structure: StructureMaps
    taps: Mapping[str, Tap]
    recompute: bool

    def level(self, block: Any, name: str, j: int, resnet: Any, h: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        h = self.resnet(resnet, h, temb)
        if getattr(block, "has_cross_attention", False):
            h = self.transformer(f"{name}.attentions.{j}", block.attentions[j], h)
        return h

    def resnet(self, block: Any, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """ResnetBlock2D with SPADE after conv2, before the skip addition."""
        if self.recompute:
            return checkpoint(self._resnet, block, x, temb, use_reentrant=False)
        return self._resnet(block, x, temb)

    def _resnet(self, block: Any, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        h = block.conv1(self.kernels.spade_norm(block.norm1, x, silu=True))
        h = h + block.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = block.conv2(self.kernels.spade_norm(block.norm2, h, silu=True))
        h = block.spade(h, self.structure[h.shape[-1]])
        skip: torch.Tensor = x if block.conv_shortcut is None else block.conv_shortcut(x)
        return skip + h

    def transformer(self, name: str, attn: Any, h: torch.Tensor) -> torch.Tensor:
        """Transformer2DModel with linear projections, then its tap.

        A transformer with a tap is not recomputed, because a tap may record features and has to run once.
        """
        if self.recompute and name not in self.taps:
            return checkpoint(self._transformer, name, attn, h, use_reentrant=False)
        return self._transformer(name, attn, h)

    def _transformer(self, name: str, attn: Any, h: torch.Tensor) -> torch.Tensor:
        size = h.shape[-2:]
        tokens = attn.proj_in(to_tokens(attn.norm(h)))
        for block in attn.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=self.context)
        h = to_map(attn.proj_out(tokens), size) + h
        if name in self.taps:
            h = to_map(self.taps[name](to_tokens(h)), size)
        return h


def embed_time(sinusoid: nn.Module, embedding: Any, t: torch.Tensor) -> torch.Tensor:
    """Timesteps (B,) -> (B, D) in the dtype of the embedding's weights; the sinusoid is computed in fp32."""
    return embedding(sinusoid(t).to(embedding.linear_1.weight.dtype))


def to_tokens(h: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return h.flatten(2).transpose(1, 2)


def to_map(tokens: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, H*W, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, size)
