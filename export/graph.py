"""One ONNX graph for each component: fixed tile for the denoiser, free sizes for encoder and decoder."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import torch
from diffusers import AutoencoderTiny
from torch import nn

from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.components import (
    component_modules,
    component_names,
    dynamic_shapes,
    example_inputs,
)
from pfstorer_rt.models.denoiser import Denoiser

from .compose import compose_autoencoder
from .fuse import FusedDenoiser
from .precision import TypedComponent, spell_out_attention

OPSET = 23
"""The first opset with an `Attention` operator, which engines replace by their own fused kernel."""
SELF_CONTAINED = 2**27
"""Bytes of constants up to which a payload is one ONNX message (2 GB is the most that one can have)."""

Binding = Literal["constants", "inputs"]
"""How a person's tensors enter a graph: fused in, or bound at run time (a plan that several people share)."""


@dataclass(frozen=True)
class Graph:
    """An exported component."""

    model: onnx_ir.Model
    origins: dict[str, str]
    """The module that each node came from, by the node's name."""

    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(v.const_value.nbytes for v in self.model.graph.initializers.values() if v.const_value is not None)

    def save(self, folder: Path, weights: str = "model.weights") -> Path:
        """Write `model.onnx` with its weights in a file beside it, one tensor at a time; returns the former's path."""
        folder.mkdir(parents=True, exist_ok=True)
        onnx_ir.save(self.model, folder / "model.onnx", external_data=weights)
        return folder / "model.onnx"

    def to_bytes(self) -> bytes:
        """Return the graph and its weights as one ONNX message, for graphs up to `SELF_CONTAINED`."""
        onnx_ir.external_data.load_to_model(self.model)
        return bytes(onnx_ir.to_proto(self.model).SerializeToString(deterministic=True))

    def ports(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return names, shapes and types of the inputs and outputs."""

        def describe(values: Any) -> dict[str, Any]:
            return {
                value.name: {
                    "shape": [d if isinstance(d, int) else d.value for d in value.shape],
                    "type": value.dtype.numpy().name,
                }
                for value in values
            }

        return describe(self.model.graph.inputs), describe(self.model.graph.outputs)


def fused_module(component: str, base: Base, identity: Identity | None = None) -> nn.Module:
    """Return a component's module with its constants folded; the base itself is left as it was."""
    module = deepcopy(component_modules(base, identity)[component])
    if isinstance(module, Denoiser):
        return FusedDenoiser(module)
    if isinstance(module.vae, AutoencoderTiny):
        compose_autoencoder(module.vae)
    return module


def build_graph(
    component: str,
    module: nn.Module,
    base: Base,
    precision: str = "fp32",
    identity: Binding = "constants",
    fused_attention: bool = True,
) -> Graph:
    """Export one component's module; for fp16 and without fused attention it is changed in place.

    fused_attention: write the operator `Attention`; else matrix products, for engines without a kernel for it.
    identity: whether the tensors of `FusedDenoiser.identity_paths` are constants, or inputs that follow the others
    in that order, under those names.
    """
    strength = bool(getattr(module, "has_strength", False))
    inputs, outputs = component_names(component, base, strength)
    example = example_inputs(component, base, strength)
    shapes = dynamic_shapes(component, base, strength)
    paths = module.identity_paths() if identity == "inputs" and isinstance(module, FusedDenoiser) else {}
    typed = TypedComponent(module, precision, tuple(paths.values())).eval()
    if not fused_attention:
        spell_out_attention(typed)
    if isinstance(module, FusedDenoiser) and paths:
        example |= module.identity_tensors()
        # With free token counts the tracer finds bounds of its own for the batch, narrower than those stated.
        shapes = {name: axes and {0: torch.export.Dim.AUTO} for name, axes in shapes.items()}
        shapes |= {name: _token_axis(name) for name in paths}
        inputs = (*inputs, *paths)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            typed,
            tuple(example[name] for name in inputs),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(tuple(shapes[name] for name in inputs),),
        )
    assert program is not None
    if component == "encoder":  # the exporter's own names for these are those of its symbols
        for value in program.model.graph.outputs:
            if value.name in ("mean", "std"):
                value.shape = onnx_ir.Shape(["batch", base.config.latent_channels, "height", "width"])
    return _without_source_notes(program.model)


def _token_axis(name: str) -> dict[int, Any] | None:
    """A person's reference has as many tokens as its mask kept; every other tensor has one size for all people."""
    return {1: torch.export.Dim.AUTO} if name.endswith((".k", ".v")) else None


def _without_source_notes(model: onnx_ir.Model) -> Graph:
    """Drop what the exporter notes of each node's origin (megabytes, and paths of its machine) but for the module."""
    origins: dict[str, str] = {}
    graphs: list[Any] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph:
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
            modules = [scope.removeprefix("module").removeprefix(".") for scope in scopes[:-1]]
            origins[node.name or ""] = modules[-1] if modules else ""
            for entry in (node, *node.outputs):
                _clear(entry)
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            _clear(value)
        _clear(graph)
    _clear(model)
    return Graph(model, origins)


def _clear(entry: Any) -> None:
    entry.metadata_props.clear()
    entry.doc_string = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on packages that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
