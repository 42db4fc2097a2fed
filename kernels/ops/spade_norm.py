"""GroupNorm with SPADE's modulation: SiLU(n (1 + scale) + shift), n = GroupNorm(x) (StableSR 3.2; Park et al. 2019).

Statistics are fp32. One kernel computes means and squared deviations of small tiles, and a second kernel combines them
by Chan's formula, so that a large mean or a large feature map costs no precision. A third kernel does the rest in one
pass over memory. Any strides work; dense channels (channels-last) or dense pixels are fast.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .layout import strides

PIXELS, CHANNELS = 64, 64
"""Size of a tile, and of the unit of the statistics."""
TILE = {"BLOCK_P": PIXELS, "BLOCK_C": CHANNELS}
CHUNKS = 32
"""Number of tiles whose statistics are combined at a time."""


@triton.jit
def _load_tile(
    base: tl.tensor,
    b: tl.tensor,
    p: tl.tensor,
    c: tl.tensor,
    inside: tl.tensor,
    s_b: tl.tensor,
    s_c: tl.tensor,
    s_p: tl.tensor,
) -> tl.tensor:
    place = base + b.to(tl.int64) * s_b + p.to(tl.int64)[:, None] * s_p + c.to(tl.int64)[None, :] * s_c
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(
    base: tl.tensor,
    b: tl.tensor,
    p: tl.tensor,
    c: tl.tensor,
    inside: tl.tensor,
    s_b: tl.tensor,
    s_c: tl.tensor,
    s_p: tl.tensor,
    values: tl.tensor,
) -> None:
    place = base + b.to(tl.int64) * s_b + p.to(tl.int64)[:, None] * s_p + c.to(tl.int64)[None, :] * s_c
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _statistics_kernel(
    x: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    x_b: tl.tensor,
    x_c: tl.tensor,
    x_p: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Store mean and sum of squared deviations of each channel over the pixels of one tile, (B, chunks, C)."""
    chunk, b = tl.program_id(0), tl.program_id(2)
    p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < P)[:, None] & (c < C)[None, :]
    values = _load_tile(x, b, p, c, inside, x_b, x_c, x_p)
    count = tl.minimum(P - chunk * BLOCK_P, BLOCK_P).to(tl.float32)
    mean = tl.sum(values, 0) / count
    deviation = tl.where(inside, values - mean[None, :], 0.0)
    place = (b.to(tl.int64) * tl.num_programs(0) + chunk) * C + c
    tl.store(means + place, mean, mask=c < C)
    tl.store(squares + place, tl.sum(deviation * deviation, 0), mask=c < C)


@triton.jit
def _combine_kernel(
    means: tl.tensor,
    squares: tl.tensor,
    chunks: tl.tensor,
    size: tl.tensor,
    P: tl.tensor,
    eps: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """Store mean and inverse standard deviation of one group of `size` channels, (B, G) (Chan et al. 1979, eq. 2.1)."""
    g, b = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, BLOCK_G)
    base = b.to(tl.int64) * chunks * size * tl.num_programs(0) + g * size + channel[None, :]
    total = tl.zeros([BLOCK_I, BLOCK_G], tl.float32)
    for start in tl.range(0, chunks, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        keep = (i < chunks)[:, None] & (channel < size)[None, :]
        count = tl.minimum(P - i * BLOCK_P, BLOCK_P).to(tl.float32)[:, None]
        place = base + i.to(tl.int64)[:, None] * size * tl.num_programs(0)
        total += count * tl.load(means + place, mask=keep, other=0.0)
    n = 1.0 * size * P  # in fp32; Triton makes a constant of a size of 1, which has no `to`
    middle = tl.sum(tl.sum(total, 1), 0) / n
    total = tl.zeros([BLOCK_I, BLOCK_G], tl.float32)
    for start in tl.range(0, chunks, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        keep = (i < chunks)[:, None] & (channel < size)[None, :]
        count = tl.minimum(P - i * BLOCK_P, BLOCK_P).to(tl.float32)[:, None]
        place = base + i.to(tl.int64)[:, None] * size * tl.num_programs(0)
        apart = tl.load(means + place, mask=keep, other=0.0) - middle
        total += tl.load(squares + place, mask=keep, other=0.0) + tl.where(keep, count * apart * apart, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / n
    tl.store(mean + b * tl.num_programs(0) + g, middle)
    tl.store(rstd + b * tl.num_programs(0) + g, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _spade_norm_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    size: tl.tensor,
    x_b: tl.tensor,
    x_c: tl.tensor,
    x_p: tl.tensor,
    a_b: tl.tensor,
    a_c: tl.tensor,
    a_p: tl.tensor,
    h_b: tl.tensor,
    h_c: tl.tensor,
    h_p: tl.tensor,
    o_b: tl.tensor,
    o_c: tl.tensor,
    o_p: tl.tensor,
    out: tl.tensor,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Normalize, modulate and apply SiLU on one tile."""
    b = tl.program_id(2)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < P)[:, None] & (c < C)[None, :]
    group = b * (C // size) + c // size
    middle = tl.load(mean + group, mask=c < C, other=0.0)
    slope = tl.load(rstd + group, mask=c < C, other=0.0) * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    y = (_load_tile(x, b, p, c, inside, x_b, x_c, x_p) - middle[None, :]) * slope[None, :] + offset[None, :]
    if MODULATED:
        y = y * (1 + _load_tile(scale, b, p, c, inside, a_b, a_c, a_p))
        y += _load_tile(shift, b, p, c, inside, h_b, h_c, h_p)
    if SILU:
        y = y * tl.sigmoid(y)
    _store_tile(out, b, p, c, inside, o_b, o_c, o_p, y)


@triton.jit
def _spade_norm_backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    grad_x: tl.tensor,
    grad_scale: tl.tensor,
    grad_shift: tl.tensor,
    sums: tl.tensor,
    products: tl.tensor,
    C: tl.tensor,
    P: tl.tensor,
    size: tl.tensor,
    g_b: tl.tensor,
    g_c: tl.tensor,
    g_p: tl.tensor,
    x_b: tl.tensor,
    x_c: tl.tensor,
    x_p: tl.tensor,
    a_b: tl.tensor,
    a_c: tl.tensor,
    a_p: tl.tensor,
    h_b: tl.tensor,
    h_c: tl.tensor,
    h_p: tl.tensor,
    o_b: tl.tensor,
    o_c: tl.tensor,
    o_p: tl.tensor,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Compute one tile of the gradients; the kernel runs twice.

    FIRST: store the gradients of the modulation, and the sums of dn and dn x^ of each channel over the tile,
    (B, chunks, C). Second run: `sums` and `products` are the means over groups, (B, G); store the gradient of x.
    grad_scale and grad_shift have the strides of grad_x.
    """
    b = tl.program_id(2)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < P)[:, None] & (c < C)[None, :]
    group = b * (C // size) + c // size
    deviation = tl.load(rstd + group, mask=c < C, other=0.0)[None, :]
    slope = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    centred = _load_tile(x, b, p, c, inside, x_b, x_c, x_p) - tl.load(mean + group, mask=c < C, other=0.0)[None, :]
    normal = centred * deviation
    n = normal * slope + offset
    g = _load_tile(grad, b, p, c, inside, g_b, g_c, g_p)
    opened = tl.full([BLOCK_P, BLOCK_C], 1.0, tl.float32)
    y = n
    if MODULATED:
        opened += _load_tile(scale, b, p, c, inside, a_b, a_c, a_p)
        y = n * opened + _load_tile(shift, b, p, c, inside, h_b, h_c, h_p)
    if SILU:
        s = tl.sigmoid(y)
        g *= s * (1 + y * (1 - s))
    dn = g * opened
    if FIRST:
        if MODULATED:
            _store_tile(grad_scale, b, p, c, inside, o_b, o_c, o_p, g * n)
            _store_tile(grad_shift, b, p, c, inside, o_b, o_c, o_p, g)
        place = (b.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * C + c
        tl.store(sums + place, tl.sum(tl.where(inside, dn, 0.0), 0), mask=c < C)
        tl.store(products + place, tl.sum(tl.where(inside, dn * normal, 0.0), 0), mask=c < C)
    else:
        along = tl.load(sums + group, mask=c < C, other=0.0)[None, :]
        across = tl.load(products + group, mask=c < C, other=0.0)[None, :]
        _store_tile(grad_x, b, p, c, inside, o_b, o_c, o_p, deviation * (dn * slope - along - normal * across))


def _grid(x: torch.Tensor) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[2], PIXELS), triton.cdiv(x.shape[1], CHANNELS), x.shape[0]


def _sizes(x: torch.Tensor, mean: torch.Tensor) -> tuple[int, int, int]:
    """Return channels, pixels and channels in a group."""
    return x.shape[1], x.shape[2], x.shape[1] // mean.shape[1]


def _modulation(
    x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and shift, or x in their places where the kernel does not read them."""
    return x if scale is None else scale, x if shift is None else shift


def statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and 1 / sqrt(variance + eps) of each group of x (B, C, P), both (B, groups) fp32."""
    batch, channels, pixels = x.shape
    grid, size = _grid(x), channels // groups
    means, squares = x.new_empty(2, batch, grid[0], channels, dtype=torch.float32)
    mean, rstd = x.new_empty(2, batch, groups, dtype=torch.float32)
    _statistics_kernel[grid](x, channels, pixels, *strides(x), means, squares, **TILE)
    _combine_kernel[groups, batch](
        means,
        squares,
        grid[0],
        size,
        pixels,
        eps,
        mean,
        rstd,
        BLOCK_P=PIXELS,
        BLOCK_I=CHUNKS,
        BLOCK_G=triton.next_power_of_2(size),
    )
    return mean, rstd


def spade_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """Launch the forward kernel on (B, C, P) tensors and the statistics of x."""
    out = torch.empty_like(x)
    a, h = _modulation(x, scale, shift)
    _spade_norm_kernel[_grid(x)](
        *(x, a, h, weight, bias, mean, rstd),
        *_sizes(x, mean),
        *strides(x, a, h, out),
        out,
        MODULATED=scale is not None,
        SILU=silu,
        **TILE,
    )
    return out


def spade_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    silu: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Launch the backward kernel twice; returns the gradients of x, weight, bias, scale and shift."""
    (channels, pixels, size), groups, grid = _sizes(x, mean), mean.shape[1], _grid(x)
    grad_x = torch.empty_like(x)
    grad_scale, grad_shift = (grad_x if t is None else torch.empty_like(grad_x) for t in (scale, shift))
    sums, products = x.new_empty(2, len(x), grid[0], channels, dtype=torch.float32)
    a, h = _modulation(x, scale, shift)

    def launch(sums: torch.Tensor, products: torch.Tensor, first: bool) -> None:
        _spade_norm_backward_kernel[grid](
            *(grad, x, a, h, weight, bias, mean, rstd, grad_x, grad_scale, grad_shift, sums, products),
            *_sizes(x, mean),
            *strides(grad, x, a, h, grad_x),
            MODULATED=scale is not None,
            SILU=silu,
            FIRST=first,
            **TILE,
        )

    launch(sums, products, True)
    along, across = sums.sum(1), products.sum(1)  # (B, C)
    of_groups = [(t * weight.float()).unflatten(1, (groups, size)).sum(2) / (size * pixels) for t in (along, across)]
    launch(of_groups[0], of_groups[1], False)
    grads = grad_x, across.sum(0).to(weight.dtype), along.sum(0).to(bias.dtype)
    return (*grads, None, None) if scale is None else (*grads, grad_scale, grad_shift)


class SpadeNormFunction(torch.autograd.Function):
    """`spade_norm_forward` with `spade_norm_backward`, on (B, C, P) tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> torch.Tensor:
        """Save the inputs and the statistics."""
        mean, rstd = statistics(x, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd, scale, shift)
        ctx.silu = silu
        return spade_norm_forward(x, weight, bias, mean, rstd, scale, shift, silu)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of all tensors."""
        x, weight, bias, mean, rstd, scale, shift = ctx.saved_tensors
        grad_tensors = spade_norm_backward(grads[0], x, weight, bias, mean, rstd, scale, shift, ctx.silu)
        return (*grad_tensors, None, None, None)


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
    """Return n (1 + scale) + shift with n = GroupNorm(x), optionally followed by SiLU.

    x, scale, shift (B, C, H, W), fp16, bf16 or fp32, any strides; weight, bias (C). Without scale and shift, the
    function is GroupNorm. Computed in fp32, differentiable in every tensor. Returns (B, C, H, W) in x's dtype and
    memory format. Raises `ValueError` for a scale without a shift, or if groups does not divide the channels.
    """
    if (scale is None) != (shift is None):
        raise ValueError("spade_norm takes scale and shift together, or neither")
    if x.shape[1] % groups:
        raise ValueError(f"spade_norm: {x.shape[1]} channels cannot be divided into {groups} groups")
    planes = [None if t is None else t.flatten(2) for t in (x, scale, shift)]
    result: torch.Tensor = SpadeNormFunction.apply(planes[0], weight, bias, planes[1], planes[2], groups, eps, silu)
    return result.unflatten(2, x.shape[2:])
