"""Cross-attention to a constant context: its keys and values are computed once and stored on the layer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from pfstorer_rt.ops import AttentionFn, AttentionProcessor, sdpa, split_heads


class ConstantContext(AttentionProcessor):
    """Attention to the buffers `k` and `v` of the layer, each (1, heads, S, C / heads)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states (B, L, C) -> (B, L, C); `encoder_hidden_states` and `attention_mask` are ignored."""
        batch = hidden_states.shape[0]
        k, v = (tensor.expand(batch, -1, -1, -1) for tensor in (attn.k, attn.v))
        return self.finish(attn, split_heads(attn.to_q(hidden_states), attn.heads), k, v, None)


@torch.no_grad()
def fold_context(attn: Attention, context: torch.Tensor, attention: AttentionFn = sdpa) -> None:
    """Replace the key and value projections of a cross-attention by their results for a context (1, S, C)."""
    # fp64: two exports of one identity round to the same constants, independently of the BLAS kernel.
    # The mean of the keys is subtracted: it adds the same value to all scores of a query, which softmax ignores.
    # Without it, fp16 overflows only at larger values.
    wide = context.double()
    k, v = (split_heads(project.double()(wide), attn.heads) for project in (attn.to_k, attn.to_v))
    attn.register_buffer("k", (k - k.mean(-2, keepdim=True)).to(context.dtype).contiguous())
    attn.register_buffer("v", v.to(context.dtype).contiguous())
    attn.to_k, attn.to_v = nn.Identity(), nn.Identity()
    attn.set_processor(ConstantContext(attention))
