"""Fused projection and gate: x + strength gamma (.) (h W^T + bias + stream - x) (PFStorer eq. 3).

gamma scales output channels. An output channel is a sum over all heads, and no program of the attention kernel has all
heads, so the gate cannot be fused into attention. The last projection of a personalization block has the output
channels, the residual stream of the block and x. With the fused gate, eq. 3 needs no extra pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .interpreter import dot
from .layout import as_matrix
from .tuning import Tile

DTYPES = (torch.float16, torch.bfloat16)
TILES = (
    Tile(64, 64, 4, 3),
    Tile(128, 64, 4, 3),
    Tile(128, 128, 8, 3),
    Tile(64, 128, 4, 3),
    Tile(32, 64, 4, 4),
    Tile(128, 256, 8, 3),
)
"""Candidate tiles (rows, output channels), the default first; the last needs 144 KB of shared memory."""
GROUP = 8
"""Rows of tiles that run together, so that they share W in the L2 cache."""


@triton.jit
def _gated_projection_kernel(
    h: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    stream: tl.tensor,
    x: tl.tensor,
    gamma: tl.tensor,
    strength: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    tokens: tl.tensor,
    h_m: tl.tensor,
    w_n: tl.tensor,
    s_m: tl.tensor,
    x_m: tl.tensor,
    o_m: tl.tensor,
    out: tl.tensor,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Compute one tile of the output; strength has one value per `tokens` rows."""
    across = tl.cdiv(N, BLOCK_N)
    group, place = tl.program_id(0) // (GROUP_M * across), tl.program_id(0) % (GROUP_M * across)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    m = (group * GROUP_M + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = m.to(tl.int64)[:, None], n.to(tl.int64)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(h + rows * h_m + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(weight + columns * w_n + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        acc = dot(a, b, acc)
    inside = (m < M)[:, None] & (n < N)[None, :]
    kept = tl.load(x + rows * x_m + n[None, :], mask=inside, other=0.0)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(stream + rows * s_m + n[None, :], mask=inside, other=0.0).to(tl.float32)
    acc -= kept.to(tl.float32)
    gate = tl.load(gamma + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    gate *= tl.load(strength + m // tokens, mask=m < M, other=0.0).to(tl.float32)[:, None]
    # A closed gate returns x bit for bit, even if the projection is not finite.
    gated = tl.where(gate == 0, kept, (kept.to(tl.float32) + gate * acc).to(kept.dtype))
    tl.store(out + rows * o_m + n[None, :], gated, mask=inside)


def gated_projection_forward(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stream: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    strength: torch.Tensor,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch the kernel with the arguments of `gated_projection`, strength as a tensor."""
    tile = tile or TILES[0]
    a, w, s, r = as_matrix(h), as_matrix(weight), as_matrix(stream), as_matrix(x)
    out = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    (m, k), n = a.shape, w.shape[0]
    strength = strength.reshape(-1).contiguous()
    _gated_projection_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
        a,
        w,
        w if bias is None else bias,
        s,
        r,
        gamma.contiguous(),
        strength,
        m,
        n,
        k,
        max(m // strength.numel(), 1),
        a.stride(0),
        w.stride(0),
        s.stride(0),
        r.stride(0),
        out.stride(0),
        out,
        BIAS=bias is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        GROUP_M=GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out.view(x.shape)


class GatedProjectionFunction(torch.autograd.Function):
    """`gated_projection_forward`, with a backward of cuBLAS matrix products, which are fastest.

    The backward recomputes the projection instead of storing it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stream: torch.Tensor,
        x: torch.Tensor,
        gamma: torch.Tensor,
        strength: torch.Tensor,
        tile: Tile | None,
    ) -> torch.Tensor:
        """Save only the inputs."""
        ctx.save_for_backward(h, weight, bias, stream, x, gamma, strength)
        return gated_projection_forward(h, weight, bias, stream, x, gamma, strength, tile)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of all tensors."""
        h, weight, bias, stream, x, gamma, strength = ctx.saved_tensors
        grad, needed = grads[0], ctx.needs_input_grad
        wide = (strength * gamma).float() * grad.float()  # gradient of the projection
        inner = wide.to(h.dtype)
        flat = inner.flatten(0, -2)
        grad_gamma = grad_strength = None
        if needed[5] or needed[6]:
            product = grad.float() * (F.linear(h, weight, bias).float() + stream.float() - x.float())
            grad_gamma = (strength * product).flatten(0, -2).sum(0).to(gamma.dtype)
            grad_strength = (gamma * product).sum_to_size(strength.shape).to(strength.dtype)
        return (
            inner @ weight if needed[0] else None,
            flat.T @ h.flatten(0, -2) if needed[1] else None,
            wide.flatten(0, -2).sum(0).to(weight.dtype) if bias is not None and needed[2] else None,
            inner,
            grad - inner,
            grad_gamma,
            grad_strength,
            None,
        )


def gated_projection(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stream: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    strength: torch.Tensor | float = 1.0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Return x + strength gamma (.) (h W^T + bias + stream - x) (PFStorer eq. 3).

    h (B, L, K), weight (N, K), bias (N), stream and x (B, L, N), all fp16 or all bf16; gamma (N) in any floating type;
    strength a scalar or (B, 1, 1). Differentiable in every tensor. Returns (B, L, N), equal to x bit for bit if
    strength gamma is zero. Raises `ValueError` for other types.
    """
    given = {"h": h, "weight": weight, "bias": bias, "stream": stream, "x": x}
    types = {name: t.dtype for name, t in given.items() if t is not None}
    if len(set(types.values())) > 1 or h.dtype not in DTYPES:
        raise ValueError(f"gated_projection: tensors are {types}, expected all fp16 or all bf16; cast them")
    strength = torch.as_tensor(strength, device=h.device)
    strength = strength if strength.is_floating_point() else strength.float()
    return GatedProjectionFunction.apply(h, weight, bias, stream, x, gamma, strength, tile)
