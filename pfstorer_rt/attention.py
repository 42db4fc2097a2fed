"""The door to the attention kernels: one table, one choice at construction, refusals with reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from pfstorer_rt.errors import MissingBackendError

AttentionFn = Callable[..., torch.Tensor]
"""attention(q, k, v, mask=None): q (B, H, L, D); k, v (B, H, S, D); mask bool or None -> (B, H, L, D)."""


@dataclass(frozen=True)
class Choice:
    """The backend that was taken and why the others before it were not."""

    name: str
    function: AttentionFn
    refused: dict[str, str] = field(default_factory=dict)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """PyTorch's own fused attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Plain matrix products in the inputs' type: on a CPU its backward is several times faster than SDPA's."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def training_backend(device: torch.device) -> str:
    """Return the backend that trains fastest on a device."""
    return "math" if device.type == "cpu" else "auto"


def _load_math(device: torch.device) -> AttentionFn:
    return math


def _load_sdpa(device: torch.device) -> AttentionFn:
    return sdpa


def _load_reference(device: torch.device) -> AttentionFn:
    function: AttentionFn = import_module("pfstorer_rt.kernels.reference").attention
    return function


def _load_xformers(device: torch.device) -> AttentionFn:
    if device.type != "cuda":
        raise MissingBackendError(f"xformers has no attention operator for {device.type}; it needs a CUDA device")
    try:
        ops = import_module("xformers.ops")
    except ImportError as error:
        raise MissingBackendError("xformers is not installed: pip install 'pfstorer-rt[gpu]'") from error

    def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            return sdpa(q, k, v, mask)  # its bias must be materialised at full size; SDPA broadcasts it
        turned = (tensor.transpose(1, 2) for tensor in (q, k, v))  # xformers takes (B, L, H, D)
        out: torch.Tensor = ops.memory_efficient_attention(*turned)
        return out.transpose(1, 2)

    return xformers


BACKENDS: dict[str, Callable[[torch.device], AttentionFn]] = {
    "sdpa": _load_sdpa,
    "xformers": _load_xformers,
    "math": _load_math,
    "reference": _load_reference,
}
"""Every backend, best first: a loader that returns the function or raises `MissingBackendError`."""


def choose(name: str = "auto", device: str | torch.device = "cpu") -> Choice:
    """Take a backend by name, or with `auto` the first of `BACKENDS` that this device has.

    Raises `ValueError` for an unknown name and `MissingBackendError` when the named one is refused.
    """
    device = torch.device(device)
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention backend {name!r}: expected auto or one of {', '.join(BACKENDS)}")
    refused: dict[str, str] = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        try:
            return Choice(candidate, BACKENDS[candidate](device), refused)
        except MissingBackendError as error:
            refused[candidate] = str(error)
    raise MissingBackendError("; ".join(refused.values()))


class AttentionProcessor:
    """Runs a diffusers `Attention` layer on tokens through the door."""

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
        """hidden_states (B, L, C), context (B, S, C'), mask bool (B, S) with True kept -> (B, L, C)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        return self.finish(attn, q, k, v, attention_mask)

    def finish(
        self, attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Split heads, attend, merge heads, project."""
        heads = attn.heads
        if mask is not None:
            mask = mask[:, None, None, :]
        out = self.attention(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), mask)
        projected: torch.Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected


def split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, L, C) -> (B, heads, L, C / heads)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)
