"""GEGLU, a feed-forward gate: first half of the channels times the GELU of the second (Shazeer 2020, eq. 6)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .layout import as_matrix

BLOCK = 1024


@triton.jit
def _phi(x: tl.tensor) -> tl.tensor:
    """Return the cumulative distribution function of the standard normal distribution."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _geglu_forward_kernel(
    x: tl.tensor,
    out: tl.tensor,
    inner: tl.tensor,
    x_m: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> None:
    """Compute a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = tl.load(x + row * x_m + n, mask=n < inner, other=0.0).to(tl.float32)
    gate = tl.load(x + row * x_m + inner + n, mask=n < inner, other=0.0).to(tl.float32)
    result = value * gate * _phi(gate)
    tl.store(out + row * inner + n, result.to(out.dtype.element_ty), mask=n < inner)


@triton.jit
def _geglu_backward_kernel(
    grad: tl.tensor, x: tl.tensor, grad_x: tl.tensor, inner: tl.tensor, x_m: tl.tensor, BLOCK_N: tl.constexpr
) -> None:
    """Compute a block of the gradient of one row, both halves."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = tl.load(x + row * x_m + n, mask=n < inner, other=0.0).to(tl.float32)
    gate = tl.load(x + row * x_m + inner + n, mask=n < inner, other=0.0).to(tl.float32)
    g = tl.load(grad + row * inner + n, mask=n < inner, other=0.0).to(tl.float32)
    phi = _phi(gate)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    place = grad_x + row * 2 * inner + n
    tl.store(place, (g * gate * phi).to(grad_x.dtype.element_ty), mask=n < inner)
    tl.store(place + inner, (g * value * (phi + gate * density)).to(grad_x.dtype.element_ty), mask=n < inner)


def geglu_forward(x: torch.Tensor) -> torch.Tensor:
    """Launch the forward kernel: (..., 2 I) -> (..., I)."""
    flat, inner = as_matrix(x), x.shape[-1] // 2
    out = flat.new_empty(len(flat), inner)
    _geglu_forward_kernel[len(flat), triton.cdiv(inner, BLOCK)](flat, out, inner, flat.stride(0), BLOCK_N=BLOCK)
    return out.view(*x.shape[:-1], inner)


def geglu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Launch the backward kernel: gradient (..., I) and input (..., 2 I) -> (..., 2 I)."""
    flat, inner = as_matrix(x), x.shape[-1] // 2
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    rows = grad.flatten(0, -2).contiguous()
    grid = len(flat), triton.cdiv(inner, BLOCK)
    _geglu_backward_kernel[grid](rows, flat, out, inner, flat.stride(0), BLOCK_N=BLOCK)
    return out.view(x.shape)


class GegluFunction(torch.autograd.Function):
    """`geglu_forward` with `geglu_backward`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Save the input."""
        ctx.save_for_backward(x)
        return geglu_forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x."""
        return geglu_backward(grads[0], ctx.saved_tensors[0])


def geglu(x: torch.Tensor) -> torch.Tensor:
    """Return x[..., :I] * GELU(x[..., I:]) with the exact GELU.

    x: (..., 2 I), fp16, bf16 or fp32. Returns (..., I) in x's dtype; computed in fp32, differentiable.
    Raises `ValueError` for an odd number of channels.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"geglu of {tuple(x.shape)}: the last axis holds value and gate, so it has to be even")
    return GegluFunction.apply(x)
