"""Triton kernels as quickly deployable TensorRT plugins, with PTX that is compiled ahead of time.

Two plugins of namespace `pfstorer`: `gated_projection`, a block's last projection with its gate, and `spade_norm`,
everything of a normalization but its statistics. `export` does not use them yet: no engine has been built with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

from pfstorer_rt.engine.tensorrt import Library
from pfstorer_rt.errors import MissingBackendError, PFStorerError

DOMAIN = "pfstorer"
FLAG = "PREFER_AOT_PYTHON_PLUGINS"


@dataclass(frozen=True)
class Launch:
    """A kernel and how it is called: inputs, `extra` integers, outputs, in this order."""

    variant: Any
    grid: Sequence[Any]
    extra: Sequence[Any]


def launch_gated_projection(trtp: Any, h: Any, weight: Any, residual: Any, delta: int) -> Launch:
    """Return the launch for (B, L, K) tensors, contiguous, of symbolic shape."""
    aot = import_module("pfstorer_rt.kernels.aot")
    (batch, length, k), n = h.shape_expr, weight.shape_expr[0]
    rows = batch * length
    variant = aot.gated_projection_variant("*fp16", "*fp16", "*fp32")
    whole = all(side.is_constant and side.constant_value() % 16 == 0 for side in (n, k))
    variant = replace(
        variant, constants={**variant.constants, "DELTA": bool(delta)},
        unaligned=("M", "tokens") if whole else variant.kernel.arg_names,
    )  # fmt: skip
    c = variant.constants
    tiles = trtp.cdiv(rows, c["BLOCK_M"]) * trtp.cdiv(n, c["BLOCK_N"])
    return Launch(variant, (tiles, 1, 1), (rows, n, k, rows, k, k, n, n, n))


def launch_spade_norm(trtp: Any, x: Any, mean: Any, modulated: int, silu: int) -> Launch:
    """Return the launch for (B, C, H, W) tensors, contiguous, of symbolic shape."""
    aot = import_module("pfstorer_rt.kernels.aot")
    batch, channels, height, width = x.shape_expr
    pixels = height * width
    variant = aot.spade_norm_variants(dense="p")[2]
    constants = {**variant.constants, "MODULATED": bool(modulated), "SILU": bool(silu)}
    variant = replace(variant, constants=constants, unaligned=variant.kernel.arg_names)
    grid = trtp.cdiv(pixels, constants["BLOCK_P"]), trtp.cdiv(channels, constants["BLOCK_C"]), batch
    strides = (channels * pixels, pixels) * 4  # of x, scale, shift and the output
    return Launch(variant, grid, (channels, pixels, channels // mean.shape_expr[1], *strides))


def compiled(trtp: Any, launch: Launch, capability: int) -> tuple[str, str, Any, Any]:
    """Return what an ahead-of-time implementation gives TensorRT: name, PTX, launch parameters, extra arguments."""
    kernel = launch.variant.compile(capability)
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = launch.grid
    parameters.block_x, parameters.shared_mem = launch.variant.warps * 32, kernel.metadata.shared
    extra = trtp.SymIntExprs(len(launch.extra))
    for i, value in enumerate(launch.extra):
        extra[i] = trtp.SymInt32(value)
    return kernel.metadata.name, plain_ptx(kernel.asm["ptx"]), parameters, extra


def plain_ptx(ptx: str) -> str:
    """Drop the parameters that Triton adds behind a kernel's own, for scratch memory; raises where they are used.

    TensorRT passes inputs, extra arguments and outputs and no more.
    """
    head, body = ptx.split(")", 1)
    parameters = re.findall(r"\.param .*?(\w+_param_\d+)", head)
    added = parameters[-2:]
    if used := [name for name in added if re.search(rf"\b{name}\b", body)]:
        raise PFStorerError(f"a kernel that needs scratch memory ({', '.join(used)}) cannot be a plugin")
    for name in added:
        head = re.sub(rf",?\s*\.param [^,]*\b{name}\b", "", head)
    return f"{head}\n){body}"


def load_api(library: Library) -> ModuleType:
    """Return the library's plugin module; raises `MissingBackendError` with what it lacks."""
    what = f"{library.target} {library.version}"
    advice = "leave --plugins out" + ("" if library.target == "tensorrt" else ", or use --target tensorrt")
    try:
        api = import_module(f"{library.module.__name__}.plugin")
    except ImportError as error:
        raise MissingBackendError(f"{what} has no plugins in Python ({error}); {advice}") from error
    if not hasattr(api, "aot_impl") or not library.has(f"NetworkDefinitionCreationFlag.{FLAG}"):
        raise MissingBackendError(f"{what} has no plugins compiled ahead of time; {advice}, or a later release")
    try:
        import_module("triton")
    except ImportError as error:
        raise MissingBackendError("--plugins compiles kernels with triton: pip install 'pfstorer-rt[gpu]'") from error
    return api


def register(trtp: Any, capability: int) -> None:
    """Register both plugins, with PTX for one compute capability (times ten), in a library's plugin module."""
    desc = trtp.TensorDesc

    def gated_projection(h, weight, bias, residual, gamma, strength, stream, delta: int):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return residual.like()

    def gated_projection_aot(h, weight, bias, residual, gamma, strength, stream, delta, outputs, tactic):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return compiled(trtp, launch_gated_projection(trtp, h, weight, residual, delta), capability)

    def spade_norm(x, scale, shift, weight, bias, mean, rstd, modulated: int, silu: int):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return x.like()

    def spade_norm_aot(x, scale, shift, weight, bias, mean, rstd, modulated, silu, outputs, tactic):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return compiled(trtp, launch_spade_norm(trtp, x, mean, modulated, silu), capability)

    results = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    pairs: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
        ("gated_projection", gated_projection, gated_projection_aot), ("spade_norm", spade_norm, spade_norm_aot),
    )  # fmt: skip
    for name, describe, implement in pairs:
        _annotate(describe, desc, desc)
        _annotate(implement, None, results)
        trtp.register(f"{DOMAIN}::{name}")(describe)
        trtp.aot_impl(f"{DOMAIN}::{name}")(implement)


def _annotate(function: Callable[..., Any], tensors: Any, result: Any) -> None:
    """Write out types as objects: the library reads them, and this file's own annotations are strings."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    given: Mapping[str, Any] = function.__annotations__
    types = {n: int if n in given else tensors for n in names if n in given or tensors is not None}
    function.__annotations__ = {**types, "return": result}
