"""Fusion: what does not depend on the picture or the timestep becomes a constant of the graph.

- The prompt is constant, so every text cross-attention keeps its keys and values only.
- The cached reference is constant, so every reference attention keeps its keys and values only.
- A block whose gamma is all zero changes nothing and is left out.

gamma itself stays one multiplication at the end of its block: the block's three branches feed each
other unscaled, so it can be folded into none of their projections.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.models.personalization import PersonalizationBlocks
from pfstorer_rt.ops import AttentionFn, AttentionProcessor, sdpa


class ConstantContext(AttentionProcessor):
    """Attention to keys and values that were computed beforehand, kept on the layer as buffers `k`, `v`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states (B, L, C) -> (B, L, C); the context that is passed is not looked at."""
        batch = hidden_states.shape[0]
        k, v = (tensor.expand(batch, -1, -1) for tensor in (attn.k, attn.v))
        return self.finish(attn, attn.to_q(hidden_states), k, v, None)


@torch.no_grad()
def fold_context(attn: Attention, context: torch.Tensor, attention: AttentionFn = sdpa) -> None:
    """Replace a cross-attention's key and value projections by their constant results for (1, S, C)."""
    # In fp64, so that two exports of one identity round to the same constants whatever kernel BLAS picks.
    # The keys' mean is taken off: it adds the same to all scores of a query, and halves overflow sooner with it.
    wide = context.double()
    k = attn.to_k.double()(wide)
    attn.register_buffer("k", (k - k.mean(1, keepdim=True)).to(context.dtype))
    attn.register_buffer("v", attn.to_v.double()(wide).to(context.dtype))
    attn.to_k, attn.to_v = nn.Identity(), nn.Identity()
    attn.set_processor(ConstantContext(attention))


class FusedDenoiser(nn.Module):
    """The denoiser with its constants folded; owns its networks, which are changed in place."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        for block in _spatial_transformers(denoiser.unet):
            fold_context(block.attn2, denoiser.context)
        if denoiser.blocks is not None:
            denoiser.blocks = _without_zero_gamma(denoiser)
            personalization: Any = denoiser.blocks
            for i, block in enumerate(personalization):
                if hasattr(denoiser, f"reference_{i}"):
                    fold_context(block.block.attn2, getattr(denoiser, f"reference_{i}"))

    @property
    def has_strength(self) -> bool:
        """Whether any personalization block is left."""
        return bool(self.denoiser.blocks)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, z_lq: torch.Tensor, strength: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x, z_lq (B, C, h, w), t (B,) float in 0..999, strength (1,) -> eps or v (B, C, h, w)."""
        return self.denoiser(x, t, z_lq, 1.0 if strength is None else strength)

    def identity_paths(self) -> dict[str, str]:
        """Return where everything that belongs to the person is kept: {name: path of a parameter or buffer}, in order.

        Names are `{layer}.gamma`, `{layer}.k` and `{layer}.v` of the reference, and `{layer}.` with the block's
        projections. A graph takes these as constants, or as inputs in this order.
        """
        if self.denoiser.blocks is None:
            return {}
        return {
            f"{layer}.{key.removeprefix('block.').replace('attn2.k', 'k').replace('attn2.v', 'v')}": (
                f"denoiser.blocks.{i}.{key}"
            )
            for i, layer in enumerate(self.denoiser.blocks.layers)
            for key in self.denoiser.blocks[i].state_dict()
        }

    def identity_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of `identity_paths`, by name and in its order."""
        state = self.state_dict()
        return {name: state[path] for name, path in self.identity_paths().items()}


def _spatial_transformers(unet: nn.Module) -> list[Any]:
    found: list[Any] = [m for m in unet.modules() if hasattr(m, "transformer_blocks")]
    return [block for transformer in found for block in transformer.transformer_blocks]


def _without_zero_gamma(denoiser: Denoiser) -> PersonalizationBlocks:
    """Drop blocks whose gamma is all zero, and move the references of the others up."""
    blocks: Any = denoiser.blocks
    kept = [i for i, block in enumerate(blocks) if bool(block.gamma.any())]
    references = [getattr(denoiser, f"reference_{i}", None) for i in kept]
    for i in range(len(blocks)):
        if hasattr(denoiser, f"reference_{i}"):
            delattr(denoiser, f"reference_{i}")
    for new, reference in enumerate(references):
        if reference is not None:
            denoiser.register_buffer(f"reference_{new}", reference, persistent=False)
    pruned = PersonalizationBlocks([blocks.layers[i] for i in kept], [], 1)
    pruned.extend(blocks[i] for i in kept)
    return pruned
