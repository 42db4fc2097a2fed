"""The definitions that every kernel is measured against: plain PyTorch, fp32 accumulation."""

from __future__ import annotations

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(D)) v, with the scores and the sums in fp32.

    q: (B, H, L, D); k, v: (B, H, S, D); mask: bool, broadcastable to (B, H, L, S), True is attended.
    Returns (B, H, L, D) in q's dtype.
    """
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
