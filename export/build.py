"""`export_plan`: base and identity to one checked plan file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from torch import nn

from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.engine.torch import component_modules, manifest
from pfstorer_rt.errors import MismatchError
from pfstorer_rt.files import sha256_bytes
from pfstorer_rt.identity import Identity, identity_path
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.plan import COMPONENTS, Payload, Plan, write_plan

from . import parity
from .graph import OPSET, build_graph, describe, example_inputs, fused_modules

TARGETS = ("onnx",)
PRECISIONS = ("fp32",)


def resolve(identity: str | Path | Identity | None, base: str | Path | Base | None) -> tuple[Base, Identity | None]:
    """Load what was named; without a base, the identity's own.

    Raises `MismatchError` when the two do not belong together or the identity's base is not at hand.
    """
    if identity is not None and not isinstance(identity, Identity):
        identity = Identity.load(identity_path(identity))
    if identity is not None and identity.settings.get("ref_source") == "live":
        raise MismatchError(
            f"identity {identity.name!r} needs its reference photographs at run time (ref_source live); "
            "personalize with ref_source cached or self to export it"
        )
    named = base if base is not None else (identity.base_name if identity else "tiny")
    loaded = named if isinstance(named, Base) else load_base(named)
    if identity is not None:
        identity.check_base(loaded.fingerprint)
    return loaded, identity


def export_plan(
    output: Path,
    identity: str | Path | Identity | None = None,
    base: str | Path | Base | None = None,
    target: str = "onnx",
    precision: str = "fp32",
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Fuse, export, check and write a plan.

    identity: name, file or object; None exports the base alone. base: name, directory or object; None
    is the identity's own. progress: called with a line at each stage.
    Raises `ParityError`, and writes nothing, when a component differs from PyTorch.
    """
    if target not in TARGETS or precision not in PRECISIONS:
        raise ValueError(f"target {target!r}, precision {precision!r}: expected one of {TARGETS} and of {PRECISIONS}")
    base, identity = resolve(identity, base)
    base.to("cpu", torch.float32)
    originals, fused = component_modules(base, identity), fused_modules(base, identity)
    payloads: dict[str, bytes] = {}
    entries: dict[str, Payload] = {}
    for component in COMPONENTS:
        progress(f"{component}: exporting")
        model = build_graph(component, fused[component], base)
        payloads[component] = model.SerializeToString(deterministic=True)
        figures = check_component(component, payloads[component], originals[component], base, precision)
        progress(f"{component}: differs from PyTorch by {figures['relative']:.1e} of the output's deviation")
        inputs, outputs = describe(model)
        entries[component] = Payload(f"{component}.onnx", sha256_bytes(payloads[component]), inputs, outputs, figures)
    described = replace(
        manifest(base, identity, target, precision),
        strength=bool(fused["denoiser"].has_strength), tools=tool_versions(), payloads=entries,
    )  # fmt: skip
    return write_plan(output, described, payloads)


def check_component(component: str, model: bytes, original: nn.Module, base: Base, precision: str) -> dict[str, float]:
    """Run a payload in ONNX Runtime against its original at several batch sizes; returns the worst figures."""
    worst: dict[str, float] = {}
    with OnnxRuntimeSession(model) as session:
        for batch in (1, 3):
            inputs = example_inputs(component, base, "strength" in session.inputs, batch)
            figures = parity.measure(original, session, inputs)
            worst = figures if not worst or figures["relative"] > worst["relative"] else worst
    parity.check(component, worst, precision)
    return worst


def tool_versions() -> dict[str, str]:
    """Return the versions of what made the plan."""
    packages = ("pfstorer-rt", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")
    return {name: version(name) for name in packages} | {"opset": str(OPSET), "onnx_ir": str(onnx.IR_VERSION)}
