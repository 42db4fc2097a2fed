"""Personalization blocks: `F + strength * gamma (.) (Block(F, reference) - F)` (PFStorer section 3.2, eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import nn

from pfstorer_rt.errors import SettingError
from pfstorer_rt.models.constant_context import fold_context
from pfstorer_rt.models.unet import RestorationUNet
from pfstorer_rt.ops import AttentionProcessor, Kernels


class LowRankLinear(nn.Module):
    """A linear layer whose matrix is the product of two matrices of rank R."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return self.up(self.down(x))


def make_low_rank(module: nn.Module, rank: int) -> None:
    """Replace every linear layer that a rank-R factorization makes smaller."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            if rank * (child.in_features + child.out_features) < child.in_features * child.out_features:
                setattr(module, name, LowRankLinear(child, rank))
        else:
            make_low_rank(child, rank)


class PersonalizationBlock(nn.Module):
    """Self-attention, attention to the reference, GEGLU feed-forward; gated per channel by gamma.

    The block is ViCo's image block at the width of the features. gamma = 1 is the ViCo update; gamma = 0, the paper's
    initial value, is the base. Buffer `reference` (1, S, C) has the tokens of the cached reference. It is None with
    `ref_source` self, and during training, where each call passes a reference.
    """

    reference: torch.Tensor | None

    def __init__(self, channels: int, head_size: int, rank: int = 0, layer: str = "") -> None:
        """Build an untrained block; layer: the spatial transformer of the UNet that the block follows."""
        super().__init__()
        self.layer = layer
        self.register_buffer("reference", None, persistent=False)
        self.block = BasicTransformerBlock(
            channels, channels // head_size, head_size, cross_attention_dim=channels, activation_fn="geglu"
        )
        if rank:
            make_low_rank(self.block, rank)
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.set_kernels(Kernels())

    def set_kernels(self, kernels: Kernels) -> None:
        """Compute both attentions, the GEGLU and the gated projection with `kernels`."""
        self.kernels = kernels
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_processor(AttentionProcessor(kernels.attention))

    def forward(
        self,
        x: torch.Tensor,
        reference: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        strength: torch.Tensor | float = 1.0,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Move the tokens towards the person.

        x: (B, L, C). reference: (1 or B, S, C), not normalised; None selects the block's cached reference, and without
        a cached reference the block attends to its input. mask: bool (1 or B, S), True is attended. strength: scalar or
        (B, 1, 1). shift: (B, W), added to the first layer of the feed-forward network, as its bias is
        (`models.prior.FaceShifts`).
        Returns (B, L, C).
        """
        b: Any = self.block
        reference = self.reference if reference is None else reference
        if reference is not None:
            reference = reference.to(x.dtype).expand(len(x), -1, -1)
        if mask is not None:
            mask = mask.expand(len(x), -1)
        stream = x + b.attn1(b.norm1(x))
        stream = stream + b.attn2(b.norm2(stream), encoder_hidden_states=reference, attention_mask=mask)
        gate, _, last = b.ff.net  # the layer between them is a dropout with probability 0
        h = gate.proj(b.norm3(stream))
        h = self.kernels.geglu(h if shift is None else h + shift.to(h.dtype)[:, None])
        if isinstance(last, LowRankLinear):
            h, last = last.down(h), last.up
        return self.kernels.gated_projection(h, last, stream, x, self.gamma, strength)

    @torch.no_grad()
    def open(self) -> None:
        """Set gamma to 1 and the last layer of both attentions and of the feed-forward network to 0.

        The output of the block stays that of the base. With gamma = 0 only gamma has a gradient at first, and it opens
        the gate for random features. Here the last layers have one at first, and add only what they have learned.
        """
        b: Any = self.block
        for layer in (b.attn1.to_out[0], b.attn2.to_out[0], b.ff.net[2]):
            last = layer.up if isinstance(layer, LowRankLinear) else layer
            for parameter in last.parameters():
                parameter.zero_()
        self.gamma.fill_(1.0)

    def fold_reference(self) -> None:
        """Replace the projections of the cached reference by constant keys and values, if there is a reference."""
        if self.reference is not None:
            fold_context(self.block.attn2, self.reference)
            self.reference = None


class PersonalizationBlocks(nn.ModuleList):
    """Personalization blocks in execution order."""

    def __iter__(self) -> Iterator[PersonalizationBlock]:
        """Iterate over the blocks."""
        return (block for block in super().__iter__() if isinstance(block, PersonalizationBlock))

    @property
    def layers(self) -> tuple[str, ...]:
        """The spatial transformers that the blocks follow."""
        return tuple(block.layer for block in self)


def build_blocks(unet: RestorationUNet, layers: Sequence[str], head_size: int, rank: int = 0) -> PersonalizationBlocks:
    """Build untrained blocks for the widths of `unet` at `layers`; raises `ValueError` for an unknown layer."""
    return PersonalizationBlocks(
        PersonalizationBlock(layer_width(unet, layer), head_size, rank, layer) for layer in layers
    )


def layer_width(unet: RestorationUNet, layer: str) -> int:
    """Return the channels at a spatial transformer of the UNet; raises `ValueError` for any other module."""
    known = [n for n, m in unet.named_modules() if hasattr(m, "transformer_blocks")]
    if layer not in known:
        raise SettingError(
            f"layer {layer!r}: not a spatial transformer of this UNet; expected one of {', '.join(known)}"
        )
    return int(unet.get_submodule(layer).norm.num_channels)


def reference_mask(attention: torch.Tensor) -> torch.Tensor:
    """Return which reference tokens show the subject: Otsu's threshold on the token's attention (ViCo 3.2).

    attention: (B, S) head-mean attention of the reference tokens to the learned token.
    Returns bool (B, S); a constant map keeps every token.
    """
    low = attention.amin(1, keepdim=True)
    spread = attention.amax(1, keepdim=True) - low
    v = (attention - low) / spread.where(spread > 0, torch.ones_like(spread))
    steps = torch.arange(1, 10, device=v.device, dtype=v.dtype) / 10
    below = (v[:, None] < steps[None, :, None]).to(v.dtype)  # (B, 9, S)
    n_low, n_high = below.mean(-1), 1 - below.mean(-1)
    sum_low, total = (below * v[:, None]).mean(-1), v.mean(-1, keepdim=True)
    mean_low = sum_low / n_low.clamp(min=1e-12)
    mean_high = (total - sum_low) / n_high.clamp(min=1e-12)
    between = n_low * n_high * (mean_low - mean_high).square()
    threshold = steps[between.argmax(1)][:, None]  # argmax returns the first of equal values
    return ((v >= threshold) & (v != 0)) | (spread <= 0)
