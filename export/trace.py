"""Trace a component to an ONNX graph without weights.

A traced graph depends on the architecture, not on values: all weights, and the tensors of a person, are inputs. One
traced graph serves all bases and people with the same architecture, because `graph.bind` gives it their tensors.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants_ir
from torch import nn

from pfstorer_rt.models.components import Component

from .progress import Phase, ignore

OPSET = 23
"""The first opset with an `Attention` operator, which engines replace by a fused kernel."""
MODULE = "module"
"""Metadata entry of a node of a traced graph: the module that the node was traced from."""
TOKENS = {2: torch.export.Dim.DYNAMIC}
"""Free axis of a reference's keys and values. Other tensors of a person have the same size for all people."""

Tensors = Mapping[str, torch.Tensor]


def trace(typed: nn.Module, component: Component, identity: Tensors, phase: Phase = ignore) -> bytes:
    """Trace a module; returns a serialized ONNX model without weights.

    typed: the module; its inputs are the component's and then `identity`. component: names and example inputs.
    identity: the tensors of a person by name, as examples.
    The graph's inputs are the component's, the person's, and the module's other parameters and buffers, by their paths.
    """
    inputs = {**component.example_inputs(), **{name: example(name, tensor) for name, tensor in identity.items()}}
    axes = {**component.dynamic_axes(), **{name: free_axes(name) for name in identity}}
    steps = f"{component.name}: tracing", f"{component.name}: translating", f"{component.name}: simplifying"
    with _quiet(), torch.no_grad():
        phase(steps[0], 0, len(steps))
        program = torch.export.export(
            typed, tuple(inputs.values()), dynamic_shapes=(tuple(axes[name] for name in inputs),), strict=False
        )
        phase(steps[1], 1, len(steps))
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=list(inputs),
            output_names=list(component.outputs),
            optimize=False,
        )
        assert translated is not None
        phase(steps[2], 2, len(steps))
        weights = {*dict(typed.named_parameters()), *dict(typed.named_buffers())}
        take_weights(translated.model, weights)
        fold(translated.model)  # removes half of the nodes, so that the next call needs half of the time
        translated.optimize()
    drop_unused(translated.model, weights)
    name_axes(translated.model, component, axes)
    keep_modules(translated.model)
    phase(steps[2], len(steps), len(steps))
    return bytes(onnx_ir.to_proto(translated.model).SerializeToString(deterministic=True))


def free_axes(name: str) -> dict[int, Any] | None:
    """Return the free axes of a person's tensor."""
    return TOKENS if name.endswith((".k", ".v")) else None


def example(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a person's tensor with at least 2 elements on its free axes: the tracer would fix an axis of size 1."""
    for axis in free_axes(name) or ():
        tensor = torch.cat([tensor, tensor], axis) if tensor.shape[axis] == 1 else tensor
    return tensor


def take_weights(model: onnx_ir.Model, weights: set[str]) -> None:
    """Make the weights inputs of the graph, so that no optimization depends on their values."""
    graph = model.graph
    for name in [name for name in graph.initializers if name in weights]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)


def fold(model: onnx_ir.Model) -> None:
    """Compute what depends on constants only."""
    fold_constants_ir(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    RemoveUnusedNodesPass()(model)


def drop_unused(model: onnx_ir.Model, weights: set[str]) -> None:
    """Remove the weights that no node reads, such as those whose place a tensor of a person takes."""
    for value in [value for value in model.graph.inputs if value.name in weights and not value.uses()]:
        model.graph.inputs.remove(value)


def name_axes(model: onnx_ir.Model, component: Component, axes: Mapping[str, Any]) -> None:
    """Name the free axes `batch`, `height` and `width`; the tracer names them after its own symbols."""
    names: dict[str, int | str] = {}
    for value in model.graph.inputs[: len(component.inputs)]:
        assert value.name and value.shape is not None
        for axis, free in (axes[value.name] or {}).items():
            name = "batch" if axis == 0 else free.__name__  # such as 8*height
            names[_symbol(str(value.shape[axis]))] = _symbol(name)
    rename_axes(model, names)
    for value in model.graph.outputs:
        if value.name in ("mean", "std"):  # the tracer derives other expressions
            value.shape = onnx_ir.Shape(["batch", component.config.latent_channels, "height", "width"])


def rename_axes(model: onnx_ir.Model, names: Mapping[str, int | str]) -> None:
    """Replace symbols in the shapes of all values of a graph; a symbol alone may become a number."""

    def renamed(dimension: Any) -> Any:
        symbol = None if isinstance(dimension, int) else dimension.value
        if symbol is None:
            return dimension
        if symbol in names:
            return names[symbol]
        return re.sub(r"[A-Za-z_]\w*", lambda match: str(names.get(match[0], match[0])), symbol)

    for value in _values(model):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([renamed(dimension) for dimension in value.shape])


def keep_modules(model: onnx_ir.Model) -> None:
    """Remove the exporter's notes on the origin of each node (megabytes, with machine paths), keep its module."""
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        modules = [scope.removeprefix("module").removeprefix(".") for scope in scopes[:-1]]
        _clear(node)
        node.metadata_props[MODULE] = modules[-1] if modules else ""
    for entry in (*_values(model), model.graph, model):
        _clear(entry)


def take_modules(model: onnx_ir.Model) -> dict[str, str]:
    """Remove the modules of the nodes from a traced graph; returns {node: module}."""
    return {node.name or "": node.metadata_props.pop(MODULE, "") for node in model.graph}


def _values(model: onnx_ir.Model) -> Iterator[Any]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _symbol(dimension: str) -> str:
    match = re.search(r"[A-Za-z_]\w*", dimension)
    assert match is not None, dimension
    return match[0]


def _clear(entry: Any) -> None:
    entry.metadata_props.clear()
    entry.doc_string = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on optional packages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
