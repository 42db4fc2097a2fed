"""One ONNX graph for each component: fixed tile for the denoiser, free sizes for encoder and decoder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from pfstorer_rt.engine.torch import component_modules, component_names
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.denoiser import Denoiser

from .fuse import FusedDenoiser

OPSET = 23
"""The first opset with an `Attention` operator, which engines replace by their own fused kernel."""
EXAMPLE_BATCH = 2  # 0 and 1 would be taken for constants


def fused_modules(base: Base, identity: Identity | None = None) -> dict[str, nn.Module]:
    """Return the component modules with constants folded; the base itself is left as it was."""
    modules = {name: deepcopy(module) for name, module in component_modules(base, identity).items()}
    denoiser = modules["denoiser"]
    assert isinstance(denoiser, Denoiser)
    return {**modules, "denoiser": FusedDenoiser(denoiser)}


def example_inputs(component: str, base: Base, strength: bool, batch: int = EXAMPLE_BATCH) -> dict[str, torch.Tensor]:
    """Return inputs of a component with the statistics it meets in use."""
    generator = torch.Generator().manual_seed(0)
    side, channels = base.config.latent_tile, base.config.latent_channels

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if component == "encoder":
        return {"image": normal(batch, 3, base.config.tile, base.config.tile).clamp(-1, 1)}
    if component == "decoder":
        return {"latent": normal(batch, channels, side, side)}
    t = torch.rand(batch, generator=generator) * 999
    inputs = {"x": normal(batch, channels, side, side), "t": t, "z_lq": normal(batch, channels, side, side)}
    return {**inputs, "strength": torch.ones(1)} if strength else inputs


def dynamic_shapes(component: str, strength: bool) -> dict[str, Any]:
    """Return the free dimensions: the batch everywhere, height and width around the denoiser."""
    batch = torch.export.Dim("batch", min=1, max=256)
    if component == "denoiser":
        shapes: dict[str, Any] = {name: {0: batch} for name in ("x", "t", "z_lq")}
        return {**shapes, "strength": None} if strength else shapes
    name = {"encoder": "image", "decoder": "latent"}[component]
    return {name: {0: batch, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}


def build_graph(component: str, module: nn.Module, base: Base) -> onnx.ModelProto:
    """Export one component's module to an ONNX model."""
    strength = bool(getattr(module, "has_strength", False))
    inputs, outputs = component_names(component, base, strength)
    example = example_inputs(component, base, strength)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(), tuple(example[name] for name in inputs), dynamo=True, opset_version=OPSET,
            input_names=list(inputs), output_names=list(outputs), verbose=False,
            dynamic_shapes=tuple(dynamic_shapes(component, strength)[name] for name in inputs),
        )  # fmt: skip
    assert program is not None
    return _without_source_notes(program.model_proto)


def describe(model: onnx.ModelProto) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return names, shapes and types of a model's inputs and outputs."""

    def ports(values: Any) -> dict[str, Any]:
        return {
            value.name: {
                "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
                "type": np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
            }
            for value in values
        }

    return ports(model.graph.input), ports(model.graph.output)


def _without_source_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what the exporter notes of each node's origin: megabytes, and the paths of the machine it ran on."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    for entries in (
        graph.node,
        graph.initializer,
        graph.value_info,
        graph.input,
        graph.output,
        model.functions,
    ):
        for entry in entries:
            entry.doc_string = ""
            del entry.metadata_props[:]
    del graph.value_info[:]
    return model


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
