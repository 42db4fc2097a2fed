"""Reference implementations for the tests of all kernels: plain PyTorch with fp32 accumulation."""

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


def gated_projection(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stream: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    strength: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Return x + strength gamma (.) (h W^T + bias + stream - x), in fp32 (PFStorer eq. 3).

    h: (B, L, K); weight: (N, K); bias: (N); stream, x: (B, L, N); gamma: (N); strength: scalar or (B, 1, 1).
    Returns (B, L, N) in x's dtype.
    """
    y = h.float() @ weight.float().T + stream.float()
    y = y if bias is None else y + bias.float()
    return (x.float() + strength * gamma.float() * (y - x.float())).to(x.dtype)


def spade_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-5,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """Return n (1 + scale) + shift with n = GroupNorm(x), or n without scale, optionally with SiLU; all in fp32.

    x, scale, shift: (B, C, H, W); weight, bias: (C). Returns (B, C, H, W) in x's dtype.
    """
    grouped = x.float().unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, (2, 3, 4), correction=0, keepdim=True)
    n = ((grouped - mean) / (variance + eps).sqrt()).flatten(1, 2)
    y = n * weight.float()[:, None, None] + bias.float()[:, None, None]
    if scale is not None and shift is not None:
        y = y * (1 + scale.float()) + shift.float()
    return (y * y.sigmoid() if silu else y).to(x.dtype)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """Return the first half of the channels times the GELU of the second; x: (..., 2 I) -> (..., I), in fp32."""
    value, gate = x.float().chunk(2, -1)
    return (value * gate * (1 + torch.erf(gate / 2**0.5)) / 2).to(x.dtype)
