"""One ONNX graph for each component: tiles of one size for the denoiser, any image size for encoder and decoder."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import torch
from diffusers import AutoencoderTiny

from pfstorer_rt.models.components import Component
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.models.fuse import FusedDenoiser, fuse_denoiser
from pfstorer_rt.models.precision import TypedComponent, spell_out_attention
from pfstorer_rt.models.sharing import share_weights

from .compose import compose_autoencoder

OPSET = 23
"""The first opset with an `Attention` operator, which engines replace by a fused kernel."""
SELF_CONTAINED = 2**27
"""Bytes of constants up to which a payload is one ONNX message (a message can have at most 2 GB)."""

Binding = Literal["constants", "inputs"]
"""A person's tensors are constants of the graph, or inputs at run time (for a plan that several people share)."""


@dataclass(frozen=True)
class Graph:
    """An exported component."""

    model: onnx_ir.Model
    origins: dict[str, str]
    """{node: module that it was exported from}."""

    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(v.const_value.nbytes for v in self.model.graph.initializers.values() if v.const_value is not None)

    def save(self, folder: Path, weights: str = "model.weights") -> Path:
        """Write `model.onnx` and its weights beside it, one tensor at a time; returns the path of `model.onnx`."""
        folder.mkdir(parents=True, exist_ok=True)
        onnx_ir.save(self.model, folder / "model.onnx", external_data=weights)
        return folder / "model.onnx"

    def to_bytes(self) -> bytes:
        """Return the graph with its weights as one ONNX message; for graphs up to `SELF_CONTAINED`."""
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


def fuse(component: Component) -> Component:
    """Return a component with folded constants; the original component and its base are not changed."""
    if isinstance(component.module, Denoiser):
        return fuse_denoiser(component)
    module = share_weights(component.module)
    if isinstance(module.vae, AutoencoderTiny):
        compose_autoencoder(module.vae)
    return component.with_module(module)


def build_graph(
    component: Component,
    precision: str = "fp32",
    identity: Binding = "constants",
    fused_attention: bool = True,
) -> Graph:
    """Export a fused component; for fp16 and without fused attention its module is changed in place.

    fused_attention: write the operator `Attention`; otherwise matrix products, for engines without a kernel for it.
    identity: the tensors of `FusedDenoiser.identity_paths` are constants, or inputs after the other inputs, with the
    same names and order.
    """
    module, inputs = component.module, component.inputs
    example, axes = component.example_inputs(), component.dynamic_axes()
    paths = module.identity_paths() if identity == "inputs" and isinstance(module, FusedDenoiser) else {}
    typed = TypedComponent(module, precision, tuple(paths.values())).eval()
    if not fused_attention:
        spell_out_attention(typed)
    if isinstance(module, FusedDenoiser) and paths:
        example |= module.identity_tensors()
        # With free token counts, the tracer derives bounds for the batch that are narrower than the stated ones.
        axes = {name: free and {0: torch.export.Dim.AUTO} for name, free in axes.items()}
        axes |= {name: _token_axis(name) for name in paths}
        inputs = (*inputs, *paths)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            typed,
            tuple(example[name] for name in inputs),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=list(inputs),
            output_names=list(component.outputs),
            dynamic_shapes=(tuple(axes[name] for name in inputs),),
        )
    assert program is not None
    for value in program.model.graph.outputs:
        if value.name in ("mean", "std"):  # the exporter names these axes after its own symbols
            value.shape = onnx_ir.Shape(["batch", component.config.latent_channels, "height", "width"])
    return _without_source_notes(program.model)


def _token_axis(name: str) -> dict[int, Any] | None:
    """Return the free token axis of a reference; other tensors have the same size for all people."""
    return {1: torch.export.Dim.AUTO} if name.endswith((".k", ".v")) else None


def _without_source_notes(model: onnx_ir.Model) -> Graph:
    """Remove the exporter's notes on the origin of each node (megabytes, with machine paths), keep its module."""
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
