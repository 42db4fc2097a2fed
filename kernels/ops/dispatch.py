"""Choose the implementation of each call: a kernel with the fastest tile on this GPU, or PyTorch.

PyTorch runs if no kernel supports the call, or if PyTorch is faster for the shape on this GPU. `Dispatch.decisions`
records the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.errors import MissingBackendError

from . import attention, gated_projection
from .geglu import geglu
from .interpreter import INTERPRETED
from .spade_norm import spade_norm
from .tuning import Tuner, Write, bucket

Ways = Mapping[str, Callable[[], torch.Tensor]]
LEAST_CAPABILITY = (8, 0)
"""Lowest compute capability with bf16 and asynchronous copies to shared memory."""
TORCH = "torch"


def check(device: torch.device, head_size: int | None) -> None:
    """Raise `MissingBackendError` with the reason if the kernels cannot run."""
    if head_size is not None and head_size not in attention.HEAD_SIZES:
        sizes = attention.HEAD_SIZES
        raise MissingBackendError(
            f"triton: heads of {head_size} channels; its attention kernel takes {sizes.start} to {sizes.stop - 1}"
        )
    if INTERPRETED.value:
        return
    if device.type != "cuda":
        raise MissingBackendError(
            f"triton needs a CUDA device, this is {device.type}; with TRITON_INTERPRET=1 its kernels run on a CPU, "
            "for checking them, not for speed"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        shown, least = (".".join(map(str, c)) for c in (capability, LEAST_CAPABILITY))
        raise MissingBackendError(f"triton: compute capability {shown}; its kernels need {least} or later")


class Dispatch:
    """The kernels with the signatures of `pfstorer_rt.ops.Kernels`."""

    def __init__(self, file: Path, write: Write) -> None:
        """file: JSON file of the timings. write: replaces this file atomically."""
        self.tuner = None if INTERPRETED.value else Tuner(file, write)
        self.decisions: dict[str, str] = {}
        """Shape -> chosen implementation and the reason."""

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """q (B, H, L, D); k, v (B, H, S, D); mask bool, broadcastable to (B, H, L, S) -> (B, H, L, D)."""
        key = (
            f"attention {_type(q)} D{q.shape[-1]} L{bucket(q.shape[2])} S{bucket(k.shape[2])} "
            f"{bucket(q.shape[0] * q.shape[1])} heads{'' if mask is None else ' masked'}"
        )

        def plain() -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        if reason := sdpa_reason(q, mask):
            return self._plain(key, plain, reason)
        keys = None if mask is None else attention.compact(mask[:, 0, 0].expand(len(q), k.shape[2]))
        tiles = attention.FORWARD_TILES[bucket(q.shape[-1])]
        return self._fastest(key, plain, {str(t): partial(attention.attention, q, k, v, keys, t) for t in tiles})

    def gated_projection(
        self,
        plain: Callable[[], torch.Tensor],
        h: torch.Tensor,
        layer: nn.Linear,
        stream: torch.Tensor,
        x: torch.Tensor,
        gamma: torch.Tensor,
        strength: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """h (B, L, K), stream and x (B, L, N), gamma (N), strength scalar or (B, 1, 1) -> (B, L, N)."""
        key = f"gated_projection {_type(x)} K{h.shape[-1]} N{x.shape[-1]} rows {bucket(x.shape[0] * x.shape[1])}"
        types = {t.dtype for t in (h, layer.weight, x, stream)}
        if len(types) > 1 or h.dtype not in gated_projection.DTYPES or torch.is_autocast_enabled(h.device.type):
            return self._plain(key, plain, "it computes on fp16 or bf16 throughout")
        if _elsewhere(h):
            return self._plain(key, plain, _elsewhere(h))
        arguments = h, layer.weight, layer.bias, stream, x, gamma, strength
        tiles = gated_projection.TILES
        return self._fastest(
            key, plain, {str(t): partial(gated_projection.gated_projection, *arguments, t) for t in tiles}
        )

    def spade_norm(
        self,
        plain: Callable[[], torch.Tensor],
        norm: nn.GroupNorm,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        silu: bool,
    ) -> torch.Tensor:
        """x, scale and shift (B, C, H, W) -> (B, C, H, W)."""
        dense = "channels" if x.stride(1) == 1 else "pixels"
        kind = f"{'modulated ' if scale is not None else ''}{'SiLU ' if silu else ''}{dense} dense"
        key = f"spade_norm {_type(x)} {tuple(x.shape[1:])} batch {bucket(x.shape[0])} {kind}"
        if norm._forward_pre_hooks or norm.weight is None or torch.is_autocast_enabled(x.device.type):
            return self._plain(key, plain, "the layer computes in types of its own")
        if _elsewhere(x):
            return self._plain(key, plain, _elsewhere(x))
        arguments = x, norm.weight, norm.bias, norm.num_groups, norm.eps, scale, shift, silu
        return self._fastest(key, plain, {"triton": lambda: spade_norm(*arguments)})

    def geglu(self, plain: Callable[[], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """x (..., 2 I) -> (..., I)."""
        key = f"geglu {_type(x)} {x.shape[-1]} rows {bucket(x.numel() // x.shape[-1])}"
        if _elsewhere(x):
            return self._plain(key, plain, _elsewhere(x))
        return self._fastest(key, plain, {"triton": lambda: geglu(x)})

    def _plain(self, key: str, plain: Callable[[], torch.Tensor], reason: str | None) -> torch.Tensor:
        self.decisions.setdefault(key, f"{TORCH}: {reason}")
        return plain()

    def _fastest(self, key: str, plain: Callable[[], torch.Tensor], kernels: Ways) -> torch.Tensor:
        """Run the fastest implementation.

        While a CUDA graph is captured, nothing can be timed: a shape that never ran before uses PyTorch.
        """
        if self.tuner is None:
            return next(iter(kernels.values()))()
        ways = {TORCH: plain, **kernels}
        if torch.cuda.is_current_stream_capturing():
            known = self.tuner.find(key, ways)
            return ways[known.fastest if known else TORCH]()
        with torch.no_grad():
            timing = self.tuner.fastest(key, ways)
        if key not in self.decisions:
            best = {name: timing.milliseconds.get(name, float("inf")) for name in (TORCH, timing.fastest)}
            self.decisions[key] = f"{timing.fastest}: " + ", ".join(f"{n} {ms:.4f} ms" for n, ms in best.items())
        return ways[timing.fastest]()


def sdpa_reason(q: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Return the reason to use `scaled_dot_product_attention` without timing, or None."""
    if mask is not None and (mask.ndim != 4 or mask.shape[1:3] != (1, 1)):
        return "the mask differs among heads or queries, and only keys can be left out"
    return attention.refusal(q) or _elsewhere(q)


def _elsewhere(tensor: torch.Tensor) -> str | None:
    """Return the reason if a tensor is not on a supported device; a base may have moved after the choice."""
    on_gpu = tensor.device.type == "cuda"
    return None if on_gpu or INTERPRETED.value else f"the tensors are on {tensor.device.type}"


def _type(tensor: torch.Tensor) -> Any:
    return str(tensor.dtype).removeprefix("torch.")
