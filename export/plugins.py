"""Triton kernels as quickly deployable TensorRT plugins, with PTX that is compiled ahead of time.

Off unless `export --plugins` asks: nobody has measured yet that they help. Two operators of domain `pfstorer` stand in
the graph for what TensorRT would compute in several passes: `gated_projection`, a block's last projection with its
gate, and `spade_norm`, everything of a normalization but its statistics. In the exported graph each is also an ONNX
function, so that ONNX Runtime runs and checks it; TensorRT gets the graph without them, and finds the plugins by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx.parser
import onnx_ir
import torch
from torch import nn

from pfstorer_rt.engine.tensorrt import Library
from pfstorer_rt.errors import MissingBackendError, PFStorerError
from pfstorer_rt.ops import Kernels

DOMAIN = "pfstorer"
FLAG = "PREFER_AOT_PYTHON_PLUGINS"


FUNCTIONS = (
    """
    <domain: "pfstorer", opset_import: ["" : 20]>
    gated_projection <delta> (h, weight, bias, residual, gamma, strength, stream) => (result) {
        a = Cast <to = 1> (h)
        w = Cast <to = 1> (weight)
        w_t = Transpose <perm = [1, 0]> (w)
        product = MatMul (a, w_t)
        b = Cast <to = 1> (bias)
        x = Cast <to = 1> (residual)
        s = Cast <to = 1> (stream)
        with_bias = Add (product, b)
        y = Add (with_bias, s)
        wanted = Constant <value_int: int = @delta> ()
        less = Cast <to = 1> (wanted)
        subtracted = Mul (less, x)
        difference = Sub (y, subtracted)
        g = Cast <to = 1> (gamma)
        t = Cast <to = 1> (strength)
        gate = Mul (t, g)
        moved = Mul (gate, difference)
        sum = Add (x, moved)
        result = CastLike (sum, residual)
    }
    """,
    """
    <domain: "pfstorer", opset_import: ["" : 20]>
    spade_norm <modulated, silu> (x, scale, shift, weight, bias, mean, rstd) => (result) {
        wide = Cast <to = 1> (x)
        batch_groups = Shape (mean)
        rest = Constant <value_ints = [-1]> ()
        by_group = Concat <axis = 0> (batch_groups, rest)
        grouped = Reshape (wide, by_group)
        last = Constant <value_ints = [2]> ()
        mean_3d = Unsqueeze (mean, last)
        rstd_3d = Unsqueeze (rstd, last)
        centred = Sub (grouped, mean_3d)
        normal = Mul (centred, rstd_3d)
        shape = Shape (x)
        n = Reshape (normal, shape)
        sides = Constant <value_ints = [1, 2]> ()
        w = Unsqueeze (weight, sides)
        b = Unsqueeze (bias, sides)
        sloped = Mul (n, w)
        affine = Add (sloped, b)
        asked = Constant <value_int: int = @modulated> ()
        use = Cast <to = 1> (asked)
        a = Cast <to = 1> (scale)
        h = Cast <to = 1> (shift)
        a_used = Mul (use, a)
        h_used = Mul (use, h)
        one = Constant <value_float = 1.0> ()
        factor = Add (one, a_used)
        scaled = Mul (affine, factor)
        y = Add (scaled, h_used)
        opened = Constant <value_int: int = @silu> ()
        open = Cast <to = 1> (opened)
        closed = Sub (one, open)
        sigmoid = Sigmoid (y)
        part = Mul (open, sigmoid)
        gate = Add (closed, part)
        product = Mul (y, gate)
        result = CastLike (product, x)
    }
    """,
)
"""What the two operators compute, for ONNX Runtime."""


def add_functions(model: onnx_ir.Model) -> None:
    """Say in a graph what its operators of the domain compute."""
    for text in FUNCTIONS:
        function = onnx_ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1


def _operator(name: str, inputs: tuple[torch.Tensor, ...], like: torch.Tensor, **flags: bool) -> torch.Tensor:
    """Stand in the graph for an operator; what it gives is of the type and shape of `like`."""
    attributes: dict[str, Any] = {key: int(value) for key, value in flags.items()}
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
    )


def _gate(
    layer: nn.Linear,
    h: torch.Tensor,
    stream: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor,
    strength: torch.Tensor | float = 1.0,
    delta: bool = True,
) -> torch.Tensor:
    bias = layer.bias if layer.bias is not None else torch.zeros_like(layer.weight[:, 0])
    strength = torch.as_tensor(strength, dtype=torch.float32, device=x.device).reshape(1)
    return _operator("gated_projection", (h, layer.weight, bias, x, gamma, strength, stream), x, delta=delta)


def _norm(
    norm: nn.GroupNorm,
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    grouped = x.float().unflatten(1, (norm.num_groups, -1)).flatten(2)
    mean = grouped.mean(-1)
    rstd = ((grouped - mean[..., None]).square().mean(-1) + norm.eps).rsqrt()
    a, b = (x if t is None else t for t in (scale, shift))
    weight, bias = norm.weight.float(), norm.bias.float()
    inputs = x, a, b, weight, bias, mean, rstd
    return _operator("spade_norm", inputs, x, modulated=scale is not None, silu=silu)


def use_plugins(module: nn.Module) -> None:
    """Let every gate and every normalization of a residual block in a component become one operator of the graph."""
    for child in module.modules():
        kernels: Any = getattr(child, "kernels", None)
        if isinstance(kernels, Kernels):
            child.kernels = replace(kernels, gated_projection=_gate, spade_norm=_norm)  # type: ignore[assignment]


def without_functions(model: Path) -> Path:
    """Write a saved graph again, beside it, as TensorRT's parser takes it: operators without their ONNX functions."""
    graph = onnx.load(model, load_external_data=False)
    del graph.functions[:]
    for node in graph.graph.node:
        if node.domain == DOMAIN:
            node.attribute.append(onnx.helper.make_attribute("plugin_namespace", DOMAIN))
    target = model.with_name("plugins.onnx")
    target.write_bytes(graph.SerializeToString())
    return target


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
        variant,
        constants={**variant.constants, "DELTA": bool(delta)},
        unaligned=("M", "tokens") if whole else variant.kernel.arg_names,
    )
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
        ("gated_projection", gated_projection, gated_projection_aot),
        ("spade_norm", spade_norm, spade_norm_aot),
    )
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
