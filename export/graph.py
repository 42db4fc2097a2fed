"""One ONNX graph for each component: tiles of one size for the denoiser, any image size for encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir
import torch
from diffusers import AutoencoderTiny

from pfstorer_rt.models.components import Component
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.models.fuse import FusedDenoiser, fuse_denoiser
from pfstorer_rt.models.precision import TypedComponent, spell_out_attention
from pfstorer_rt.models.sharing import share_weights

from .compose import compose_autoencoder
from .graph_cache import graph_key, load_graph, save_graph
from .norms import spell_out_group_norms
from .progress import Phase, ignore
from .trace import Tensors, fold, free_axes, rename_axes, take_modules, trace

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
    native_norms: bool = True,
    phase: Phase = ignore,
) -> Graph:
    """Export a fused component; for fp16 and without fused attention its module is changed in place.

    fused_attention: write the operator `Attention`; otherwise matrix products, for engines without a kernel for it.
    native_norms: write the operator `GroupNormalization`; otherwise `InstanceNormalization`, for the same reason.
    identity: the tensors of `FusedDenoiser.identity_paths` are constants, or inputs after the other inputs, with the
    same names and order.
    """
    module = component.module
    paths = module.identity_paths() if isinstance(module, FusedDenoiser) else {}
    typed = TypedComponent(module, precision, tuple(paths.values())).eval()
    if not fused_attention:
        spell_out_attention(typed)
    weights = {**dict(typed.named_parameters()), **dict(typed.named_buffers())}
    person = {name: weights.pop(f"module.{path}") for name, path in paths.items()}
    model = onnx_ir.from_proto(onnx.load_from_string(traced(typed, component, paths, person, phase)))
    origins = take_modules(model)
    if not native_norms:
        spell_out_group_norms(model)
    bind(model, weights if identity == "inputs" else weights | person)
    return Graph(model, origins)


def traced(
    typed: TypedComponent, component: Component, paths: Mapping[str, str], person: Tensors, phase: Phase
) -> bytes:
    """Return the traced graph of a component, from the cache if it has the graph.

    paths: `FusedDenoiser.identity_paths`; person: the tensors by the same names.
    """
    free = {f"module.{path}": _free_shape(name, person[name]) for name, path in paths.items()}
    example = [(name, tuple(tensor.shape)) for name, tensor in component.example_inputs().items()]
    key = graph_key(typed, free, example, component.outputs)
    model = load_graph(key) if key else None
    if model is None:
        model = trace(typed, component, person, phase)
        if key:
            save_graph(key, model)
    return model


def bind(model: onnx_ir.Model, tensors: Tensors) -> None:
    """Make inputs of a traced graph constants, by name, and compute what depends on constants only."""
    graph, sizes = model.graph, dict[str, int | str]()
    for value in list(graph.inputs):
        if value.name is None or value.shape is None or value.name not in tensors:
            continue
        array = tensors[value.name].detach().numpy()
        sizes |= {str(d): size for d, size in zip(value.shape, array.shape, strict=True) if not isinstance(d, int)}
        graph.inputs.remove(value)
        value.const_value = onnx_ir.Tensor(array, name=value.name)
        graph.register_initializer(value)
    rename_axes(model, sizes)
    fold(model)


def _free_shape(name: str, tensor: torch.Tensor) -> tuple[int | None, ...]:
    """Return the shape of a person's tensor with None for its free axes."""
    free = free_axes(name) or {}
    return tuple(None if axis in free else size for axis, size in enumerate(tensor.shape))
