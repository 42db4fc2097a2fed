"""The interface to the kernels: a table of backends, and their choice at construction of a model.

Models call kernels only through a `Kernels` object. Its functions receive layers instead of weights, so that PyTorch
runs the hooks of a layer (`models.precision`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pfstorer_rt.errors import MissingBackendError, SettingError
from pfstorer_rt.extras import install
from pfstorer_rt.files import atomic_write, cache_home

AttentionFn = Callable[..., torch.Tensor]
"""attention(q, k, v, mask=None): q (B, H, L, D); k, v (B, H, S, D); mask bool or None -> (B, H, L, D)."""


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Fused attention of PyTorch."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention by matrix products in the inputs' dtype. On a CPU its backward is several times faster than SDPA's."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def gated_projection(
    h: torch.Tensor,
    layer: nn.Linear,
    stream: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    strength: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Return x + strength gamma (.) (layer(h) + stream - x): last projection and gate of a block (PFStorer eq. 3).

    h: (B, L, K); stream (residual of the block) and x: (B, L, N); gamma: (N); strength: scalar or (B, 1, 1).
    Returns (B, L, N) in x's dtype.
    """
    return (x + strength * gamma * (layer(h) + stream - x)).to(x.dtype)


def spade_norm(
    norm: nn.GroupNorm,
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """Return norm(x) (1 + scale) + shift, or norm(x) without scale, optionally followed by SiLU; all (B, C, H, W)."""
    y: torch.Tensor = norm(x)
    if scale is not None and shift is not None:
        y = y * (1 + scale) + shift
    return F.silu(y) if silu else y


def geglu(x: torch.Tensor) -> torch.Tensor:
    """Return the first half of the channels times the GELU of the second: (..., 2 I) -> (..., I)."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


@dataclass(frozen=True)
class Kernels:
    """The functions of a backend. The defaults are PyTorch's implementations."""

    attention: AttentionFn = sdpa
    gated_projection: Callable[..., torch.Tensor] = gated_projection
    spade_norm: Callable[..., torch.Tensor] = spade_norm
    geglu: Callable[[torch.Tensor], torch.Tensor] = geglu


@dataclass(frozen=True)
class Choice:
    """The chosen backend, and the reason why each earlier backend was rejected."""

    name: str
    kernels: Kernels
    refused: dict[str, str] = field(default_factory=dict)


Loader = Callable[[torch.device, int | None], Kernels]
"""loader(device, head size or None if unknown) returns the kernels or raises `MissingBackendError` with the reason."""


def training_backend(device: torch.device) -> str:
    """Return the backend that trains fastest on a device."""
    return "math" if device.type == "cpu" else "auto"


def _load_math(device: torch.device, head_size: int | None) -> Kernels:
    return Kernels(math)


def cudnn_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Fused attention of PyTorch, by cuDNN where it supports the call; it is the fastest on Hopper."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return sdpa(q, k, v, mask)


FUSED = (sdpa, cudnn_first)
"""Attention whose scores stay in fp32, whatever the type of its inputs."""


def _load_sdpa(device: torch.device, head_size: int | None) -> Kernels:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return Kernels(cudnn_first if hopper else sdpa)


def _load_reference(device: torch.device, head_size: int | None) -> Kernels:
    return Kernels(import_module("pfstorer_rt.kernels.reference").attention)


def _load_triton(device: torch.device, head_size: int | None) -> Kernels:
    try:
        import_module("triton")
    except ImportError as error:
        raise MissingBackendError(f"triton is not installed: {install('gpu')} (Linux)") from error
    module = import_module("pfstorer_rt.kernels.dispatch")
    module.check(device, head_size)
    dispatch = module.Dispatch(cache_home() / "kernels.json", atomic_write)

    def gate(
        h: torch.Tensor,
        layer: nn.Linear,
        stream: torch.Tensor,
        x: torch.Tensor,
        gamma: torch.Tensor,
        strength: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        arguments = h, layer, stream, x, gamma, strength
        return dispatch.gated_projection(lambda: gated_projection(*arguments), *arguments)

    def norm(
        layer: nn.GroupNorm,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        silu: bool = False,
    ) -> torch.Tensor:
        arguments = layer, x, scale, shift, silu
        return dispatch.spade_norm(lambda: spade_norm(*arguments), *arguments)

    return Kernels(dispatch.attention, gate, norm, lambda x: dispatch.geglu(lambda: geglu(x), x))


def _load_xformers(device: torch.device, head_size: int | None) -> Kernels:
    if device.type != "cuda":
        raise MissingBackendError(f"xformers has no attention operator for {device.type}; it needs a CUDA device")
    try:
        ops = import_module("xformers.ops")
    except ImportError as error:
        raise MissingBackendError(f"xformers is not installed: {install('gpu')}") from error

    def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            return sdpa(q, k, v, mask)  # xformers needs the mask at full size; SDPA broadcasts it
        turned = (tensor.transpose(1, 2) for tensor in (q, k, v))  # xformers expects (B, L, H, D)
        out: torch.Tensor = ops.memory_efficient_attention(*turned)
        return out.transpose(1, 2)

    return Kernels(xformers)


BACKENDS: dict[str, Loader] = {
    "sdpa": _load_sdpa,
    "triton": _load_triton,
    "xformers": _load_xformers,
    "math": _load_math,
    "reference": _load_reference,
}
"""All backends, in the order of `auto`. `triton` follows `sdpa` until measurements on a GPU show that it is faster."""


def choose(name: str = "auto", device: str | torch.device = "cpu", head_size: int | None = None) -> Choice:
    """Choose a backend by name, or with `auto` the first of `BACKENDS` that supports the device and head size.

    Raises `ValueError` for an unknown name and `MissingBackendError` if the backend cannot be used.
    """
    device = torch.device(device)
    if name != "auto" and name not in BACKENDS:
        raise SettingError(f"attention backend {name!r}: expected auto or one of {', '.join(BACKENDS)}")
    refused: dict[str, str] = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        try:
            return Choice(candidate, BACKENDS[candidate](device, head_size), refused)
        except MissingBackendError as error:
            refused[candidate] = str(error)
    raise MissingBackendError("; ".join(refused.values()))


class AttentionProcessor:
    """Processor of a diffusers `Attention` layer that calls the attention of a backend."""

    def __init__(self, attention: AttentionFn) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states (B, L, C), context (B, S, C'), mask bool (B, S) with True attended -> (B, L, C)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (split_heads(tokens, attn.heads) for tokens in projected)
        return self.finish(attn, q, k, v, attention_mask)

    def finish(
        self, attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """q (B, H, L, D); k, v (B, H, S, D): compute attention, merge heads, project to (B, L, C)."""
        if mask is not None:
            mask = mask[:, None, None, :]
        out = self.attention(q, k, v, mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, L, C) -> (B, heads, L, C / heads)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)
