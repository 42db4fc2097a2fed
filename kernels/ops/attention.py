"""Attention: softmax(q k^T / sqrt(D)) v without storing the scores (Dao, FlashAttention-2, algorithms 1 and 2).

Scores, softmax and sums are fp32; the inputs of the matrix products are fp16 or bf16. There is no causal mask. The
caller passes the positions of the attended keys, and the kernels read only these keys.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .interpreter import dot
from .layout import dense, strides
from .tuning import Tile

HEAD_SIZES = range(32, 129)
"""Supported head sizes. The kernel pads a head size with zeros to the next power of two."""
DTYPES = (torch.float16, torch.bfloat16)
FORWARD_TILES = {
    32: (Tile(64, 64, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(64, 32, 4, 4), Tile(16, 64, 4, 3)),
    64: (Tile(64, 64, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(64, 32, 4, 4), Tile(16, 64, 4, 3)),
    128: (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 32, 4, 3), Tile(64, 32, 4, 3), Tile(16, 64, 4, 2)),
}
"""Padded head size -> candidate tiles (queries, keys). The first is the default: it spills no registers on any
supported GPU. All fit into the 99 KB of shared memory of sm_89."""
BACKWARD_TILES = {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 8, 2)}
"""Padded head size -> tile (rows per loop step, rows per program) of both backward kernels.

The tiles leave room for twice the operands of the forward kernel.
"""


class Keys(NamedTuple):
    """The attended keys of each row of the batch."""

    positions: torch.Tensor
    """(B, S) int32: the positions of the attended keys first; the remaining values are ignored."""
    lengths: torch.Tensor
    """(B,) int32: the number of attended keys."""


def compact(mask: torch.Tensor) -> Keys:
    """Convert a key mask, bool (B, S) with True attended, to positions, without synchronizing with the GPU."""
    index = torch.argsort(~mask, dim=-1, stable=True)
    return Keys(index.to(torch.int32), mask.sum(-1, dtype=torch.int32))


@triton.jit
def _load_rows(
    base: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    keep: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Load rows (R,) of a matrix with D columns as (R, BLOCK_D), zero beyond D or where not `keep`; None keeps all."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None].to(tl.int64) * stride + d[None, :]
    if keep is None:
        if D == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=keep[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_rows(
    base: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    keep: tl.tensor,
    values: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    d = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None].to(tl.int64) * stride + d[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=keep[:, None] & (d < D)[None, :])


@triton.jit
def _key_rows(
    index: tl.tensor,
    b: tl.tensor,
    S: tl.tensor,
    s: tl.tensor,
    keep: tl.tensor,
    INDEXED: tl.constexpr,
) -> tl.tensor:
    """Return the positions of the s-th attended keys."""
    if not INDEXED:
        return s
    elif keep is None:
        return tl.load(index + b.to(tl.int64) * S + s)
    else:
        return tl.load(index + b.to(tl.int64) * S + s, mask=keep, other=0)


@triton.jit
def _attend(
    acc: tl.tensor,
    total: tl.tensor,
    highest: tl.tensor,
    query: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    index: tl.tensor,
    b: tl.tensor,
    k_s: tl.tensor,
    v_s: tl.tensor,
    S: tl.tensor,
    scale: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INDEXED: tl.constexpr,
    CUT: tl.constexpr,
) -> tl.tensor:
    """Process the keys from `first` to `last` with a running maximum and sum. CUT: the last tile is partial."""
    for start in tl.range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keep = (s < last) if CUT else None
        rows = _key_rows(index, b, S, s, keep, INDEXED)
        key = _load_rows(k, rows, k_s, keep, D, BLOCK_D)
        scores = dot(query, tl.trans(key), tl.zeros([query.shape[0], BLOCK_S], tl.float32)) * scale
        if CUT:
            scores = tl.where((s < last)[None, :], scores, float("-inf"))
        highest_now = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - highest_now[:, None])
        shrink = tl.exp2(highest - highest_now)
        total = total * shrink + tl.sum(p, 1)
        value = _load_rows(v, rows, v_s, keep, D, BLOCK_D)
        acc = dot(p.to(value.dtype), value, acc * shrink[:, None])
        highest = highest_now
    return acc, total, highest


@triton.jit
def _attention_forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    index: tl.tensor,
    length: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_l: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_s: tl.tensor,
    v_b: tl.tensor,
    v_h: tl.tensor,
    v_s: tl.tensor,
    o_b: tl.tensor,
    o_h: tl.tensor,
    o_l: tl.tensor,
    H: tl.tensor,
    L: tl.tensor,
    S: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INDEXED: tl.constexpr,
) -> None:
    """Attend from one tile of queries to all keys; `scale` includes log2(e)."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    i = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    query = _load_rows(q + b.to(tl.int64) * q_b + h * q_h, i, q_l, i < L, D, BLOCK_D)
    k += b.to(tl.int64) * k_b + h * k_h
    v += b.to(tl.int64) * v_b + h * v_h
    last = S
    if INDEXED:
        last = tl.load(length + b)
    highest = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    whole = last // BLOCK_S * BLOCK_S
    acc, total, highest = _attend(
        acc, total, highest, query, k, v, index, b, k_s, v_s, S, scale, 0, whole, D, BLOCK_D, BLOCK_S, INDEXED, False
    )
    acc, total, highest = _attend(
        acc, total, highest, query, k, v, index, b, k_s, v_s, S, scale, whole, last, D, BLOCK_D, BLOCK_S, INDEXED, True
    )
    # A row without keys gives zeros. Its logarithm is infinite, so that its weights are zero in the backward too.
    log_total = tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    _store_rows(out + b.to(tl.int64) * o_b + h * o_h, i, o_l, i < L, acc, D, BLOCK_D)
    tl.store(lse + tl.program_id(1).to(tl.int64) * L + i, log_total, mask=i < L)


@triton.jit
def _attention_backward_keys_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    index: tl.tensor,
    length: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_l: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_s: tl.tensor,
    v_b: tl.tensor,
    v_h: tl.tensor,
    v_s: tl.tensor,
    g_b: tl.tensor,
    g_h: tl.tensor,
    g_l: tl.tensor,
    H: tl.tensor,
    L: tl.tensor,
    S: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INDEXED: tl.constexpr,
) -> None:
    """Compute the gradients of one tile of keys and values; grad_k, grad_v: (B, H, S, D) contiguous."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    last = S
    if INDEXED:
        last = tl.load(length + b)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = _key_rows(index, b, S, s, s < last, INDEXED)
    key = _load_rows(k + b.to(tl.int64) * k_b + h * k_h, rows, k_s, s < last, D, BLOCK_D)
    value = _load_rows(v + b.to(tl.int64) * v_b + h * v_h, rows, v_s, s < last, D, BLOCK_D)
    q += b.to(tl.int64) * q_b + h * q_h
    grad += b.to(tl.int64) * g_b + h * g_h
    acc_k = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_S, BLOCK_L], tl.float32)
    for start in tl.range(0, L, BLOCK_L):
        i = start + tl.arange(0, BLOCK_L)
        query = _load_rows(q, i, q_l, i < L, D, BLOCK_D)
        g = _load_rows(grad, i, g_l, i < L, D, BLOCK_D)
        scores = dot(key, tl.trans(query), zeros) * scale
        # Beyond L, the logarithm is +inf and p is 0. Beyond the last key, nothing is stored.
        p = tl.exp2(scores - tl.load(lse + bh * L + i, mask=i < L, other=float("inf"))[None, :])
        acc_v = dot(p.to(g.dtype), g, acc_v)
        ds = p * (dot(value, tl.trans(g), zeros) - tl.load(delta + bh * L + i, mask=i < L, other=0.0)[None, :])
        acc_k = dot(ds.to(query.dtype), query, acc_k)
    acc_k *= scale * 0.6931471805599453  # without log2(e)
    _store_rows(grad_k + bh * S * D, rows, D, s < last, acc_k, D, BLOCK_D)
    _store_rows(grad_v + bh * S * D, rows, D, s < last, acc_v, D, BLOCK_D)


@triton.jit
def _attention_backward_queries_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad_q: tl.tensor,
    index: tl.tensor,
    length: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_l: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_s: tl.tensor,
    v_b: tl.tensor,
    v_h: tl.tensor,
    v_s: tl.tensor,
    g_b: tl.tensor,
    g_h: tl.tensor,
    g_l: tl.tensor,
    H: tl.tensor,
    L: tl.tensor,
    S: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INDEXED: tl.constexpr,
) -> None:
    """Compute the gradient of one tile of queries; grad_q: (B, H, L, D) contiguous."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    last = S
    if INDEXED:
        last = tl.load(length + b)
    i = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    query = _load_rows(q + b.to(tl.int64) * q_b + h * q_h, i, q_l, i < L, D, BLOCK_D)
    g = _load_rows(grad + b.to(tl.int64) * g_b + h * g_h, i, g_l, i < L, D, BLOCK_D)
    log_total = tl.load(lse + bh * L + i, mask=i < L, other=0.0)
    d = tl.load(delta + bh * L + i, mask=i < L, other=0.0)
    k += b.to(tl.int64) * k_b + h * k_h
    v += b.to(tl.int64) * v_b + h * v_h
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    for start in tl.range(0, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        rows = _key_rows(index, b, S, s, s < last, INDEXED)
        key = _load_rows(k, rows, k_s, s < last, D, BLOCK_D)
        value = _load_rows(v, rows, v_s, s < last, D, BLOCK_D)
        p = tl.exp2(dot(query, tl.trans(key), zeros) * scale - log_total[:, None])
        p = tl.where((s < last)[None, :], p, 0.0)
        ds = p * (dot(g, tl.trans(value), zeros) - d[:, None])
        acc = dot(ds.to(key.dtype), key, acc)
    acc *= scale * 0.6931471805599453  # without log2(e)
    _store_rows(grad_q + bh * L * D, i, D, i < L, acc, D, BLOCK_D)


def _indices(keys: Keys | None, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (q, q) if keys is None else (keys.positions.contiguous(), keys.lengths)  # not read without keys


def _options(q: torch.Tensor, k: torch.Tensor, keys: Keys | None, tile: Tile) -> dict[str, Any]:
    """Return the arguments that all three kernels take by name."""
    head = q.shape[-1]
    return {
        "H": q.shape[1],
        "L": q.shape[2],
        "S": k.shape[2],
        "scale": math.log2(math.e) / math.sqrt(head),
        "D": head,
        "BLOCK_D": triton.next_power_of_2(head),
        "INDEXED": keys is not None,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def default_tile(head_size: int) -> Tile:
    """Return the forward tile that is used without timing."""
    return FORWARD_TILES[triton.next_power_of_2(head_size)][0]


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys | None = None, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel.

    q (B, H, L, D), k and v (B, H, S, D), fp16 or bf16, any strides. Returns the output (B, H, L, D) and the base-2
    logarithm of the softmax denominators, (B, H, L) fp32. The memory layout of the output is (B, L, H, D), so that
    merging the heads needs no copy.
    """
    q, k, v = dense(q), dense(k), dense(v)
    batch, heads, length, head = q.shape
    tile = tile or default_tile(head)
    out = q.new_empty(batch, length, heads, head).transpose(1, 2)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    arguments = *_indices(keys, q), *strides(q, k, v, out)
    options = {**_options(q, k, keys, tile), "BLOCK_L": tile.rows, "BLOCK_S": tile.columns}
    _attention_forward_kernel[triton.cdiv(length, tile.rows), batch * heads](q, k, v, out, lse, *arguments, **options)
    return out, lse


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: Keys | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward kernels on the inputs and outputs of the forward kernel; returns the gradients of q, k and v.

    The kernels recompute the softmax from `lse`. The gradients of keys that are not attended are zero.
    """
    q, k, v, grad = dense(q), dense(k), dense(v), dense(grad)
    delta = (grad.float() * out.float()).sum(-1)
    grad_q, empty = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like
    if keys is not None:
        empty = torch.zeros_like
    grad_k, grad_v = (empty(tensor, memory_format=torch.contiguous_format) for tensor in (k, v))
    tile = BACKWARD_TILES[triton.next_power_of_2(q.shape[-1])]
    inputs, arguments = (q, k, v, grad, lse, delta), (*_indices(keys, q), *strides(q, k, v, grad))
    options, pairs = _options(q, k, keys, tile), q.shape[0] * q.shape[1]
    _attention_backward_keys_kernel[triton.cdiv(k.shape[2], tile.columns), pairs](
        *inputs, grad_k, grad_v, *arguments, **options, BLOCK_L=tile.rows, BLOCK_S=tile.columns
    )
    _attention_backward_queries_kernel[triton.cdiv(q.shape[2], tile.columns), pairs](
        *inputs, grad_q, *arguments, **options, BLOCK_L=tile.columns, BLOCK_S=tile.rows
    )
    return grad_q, grad_k, grad_v


class AttentionFunction(torch.autograd.Function):
    """`attention_forward` with `attention_backward`."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys | None, tile: Tile | None
    ) -> torch.Tensor:
        """Save the inputs, the output and one logarithm per query."""
        out, lse = attention_forward(q, k, v, keys, tile)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.keys = keys
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        return (*attention_backward(grads[0], q, k, v, out, lse, ctx.keys), None, None)


def refusal(q: torch.Tensor) -> str | None:
    """Return the reason why the kernel does not support these queries, or None if it does."""
    if q.dtype not in DTYPES:
        return f"it computes on fp16 and bf16, these are {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in HEAD_SIZES:
        return f"its head sizes are {HEAD_SIZES.start} to {HEAD_SIZES.stop - 1}, this is {q.shape[-1]}"
    return None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys | None = None, tile: Tile | None = None
) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(D)) v, differentiable in q, k and v.

    q (B, H, L, D), k and v (B, H, S, D), fp16 or bf16, D 32 to 128, any L and S. keys: the attended keys, None for all;
    a row without keys gives zeros. tile: None is the default tile. Returns (B, H, L, D) in q's dtype.
    Raises `ValueError` for other types and head sizes.
    """
    if reason := refusal(q):
        raise ValueError(f"attention of {tuple(q.shape)}: {reason}; use scaled_dot_product_attention")
    batch, heads, _, head = q.shape
    fits = k.shape == v.shape and k.shape[:2] == (batch, heads) and k.shape[3] == head and q.dtype == k.dtype == v.dtype
    if not fits:
        got = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"attention of {got}; expected (B, H, L, D) and twice (B, H, S, D) of one type")
    return AttentionFunction.apply(q, k, v, keys, tile)
