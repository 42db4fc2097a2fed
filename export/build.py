"""`export_plan`: base and identity to one checked plan file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch

from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.engine.session import Array
from pfstorer_rt.engine.torch import component_modules, manifest
from pfstorer_rt.errors import MismatchError, ParityError
from pfstorer_rt.files import sha256_file
from pfstorer_rt.identity import Identity, identity_path
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.plan import COMPONENTS, Payload, Plan, write_plan

from . import parity
from .graph import OPSET, build_graph, example_inputs, fused_module
from .probes import probe_inputs
from .tensorrt import BuildOptions, EngineBuilder

TARGETS = ("onnx", "tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16")
DEFAULT_PRECISION = {"onnx": "fp32", "tensorrt": "fp16", "tensorrt-rtx": "fp16"}
"""What `auto` means: halves where the hardware is fast at them."""


@dataclass(frozen=True)
class Progress:
    """What an export tells its caller."""

    line: Callable[[str], None] = lambda _: None
    """Called with a line at each stage."""
    phase: Callable[[str, int, int], None] = lambda _, __, ___: None
    """phase(name, steps done, steps in all), while an engine is built."""


@dataclass
class Expected:
    """What a component's original computes, kept while the original itself need not be."""

    inputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    outputs: list[list[Array]] = field(default_factory=list)
    largest: float = 0.0


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
    precision: str = "auto",
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Fuse, export, check, build and write a plan.

    identity: name, file or object; None exports the base alone. base: name, directory or object; None
    is the identity's own. precision: `fp32`, `fp16`, or `auto` (fp32 for ONNX, fp16 for TensorRT); with fp16
    an encoder or decoder whose values would overflow stays in fp32. options: how TensorRT engines are built.
    Raises `ParityError`, and writes nothing, when a component differs from PyTorch; `MissingBackendError`
    when TensorRT is asked for and not installed.
    """
    if target not in TARGETS or precision not in ("auto", *PRECISIONS):
        raise ValueError(
            f"target {target!r}, precision {precision!r}: expected one of {TARGETS} and of {('auto', *PRECISIONS)}"
        )
    progress = progress or Progress()
    precision = DEFAULT_PRECISION[target] if precision == "auto" else precision
    builder = None if target == "onnx" else EngineBuilder(target, options or BuildOptions(), progress.phase)
    owned = not isinstance(base, Base)
    base, identity = resolve(identity, base)
    base.to("cpu", torch.float32)
    described = replace(
        manifest(base, identity, target, precision), tools=tool_versions(),
        compute_capabilities=builder.capabilities if builder else [],
    )  # fmt: skip
    if builder:
        described.tools[target] = builder.library.version
    entries: dict[str, Payload] = {}
    with TemporaryDirectory(prefix=".pfstorer-", dir=output.resolve().parent) as folder:
        files = {component: Path(folder) / component / "payload" for component in COMPONENTS}
        for component in COMPONENTS:
            progress.line(f"{component}: exporting")
            expected = expect(component, base, identity, precision)
            if owned and component == "denoiser" and precision == "fp16":
                halve_weights(base)  # nothing after this looks at them in fp32, and a large base is gigabytes
            entries[component] = export_component(
                component, base, identity, precision, expected, builder, files[component], progress
            )
        described = replace(described, payloads=entries, strength="strength" in entries["denoiser"].inputs)
        return write_plan(output, described, files)


def export_component(
    component: str, base: Base, identity: Identity | None, precision: str, expected: Expected,
    builder: EngineBuilder | None, file: Path, progress: Progress,
) -> Payload:  # fmt: skip
    """Export one component, check it in ONNX Runtime, build its engine where there is a builder, and write it."""
    if precision == "fp16" and not parity.fits_halves(expected.largest):
        reach = f"{component}: its values reach {expected.largest:.3g}, too near the largest half, 65504"
        if component == "denoiser":
            raise ParityError(f"{reach}; export with --precision fp32")
        progress.line(f"{reach}; it stays in fp32")
        precision = "fp32"
    graph = build_graph(component, fused_module(component, base, identity), base, precision)
    saved = graph.save(file.parent)
    figures = compare(component, saved, expected, precision)
    progress.line(f"{component}: differs from PyTorch by {figures['relative']:.1e} of the output's deviation")
    inputs, outputs = graph.ports()
    if builder is None:
        file.write_bytes(graph.to_bytes())
        return Payload(f"{component}.onnx", sha256_file(file), inputs, outputs, figures, precision)
    progress.line(f"{component}: building for {builder.library.target}")
    origins = graph.origins
    del graph  # its weights are in the file that the builder reads
    built = builder.build(component, origins, saved, base, file)
    return Payload(
        f"{component}.engine", sha256_file(file), inputs, outputs, figures, precision, built.profiles, built.layers
    )


def halve_weights(base: Base) -> None:
    """Round the matrices and kernels of the UNet and the structure encoder to fp16, to halve the memory they take."""
    for module in (base.unet, base.structure_encoder):
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "time_embedding" not in name:
                parameter.data = parameter.data.half()


def expect(component: str, base: Base, identity: Identity | None, precision: str) -> Expected:
    """Run a component's original on what the export will be compared on."""
    original = component_modules(base, identity)[component].eval()
    strength = bool(getattr(original, "has_strength", False))
    expected = Expected([example_inputs(component, base, strength, batch) for batch in (1, 3)])
    if precision == "fp16":
        probes = list(probe_inputs(component, base, strength).values())
        expected.largest = max(parity.largest_value(original, inputs) for inputs in probes)
        expected.inputs += probes
    expected.outputs = [parity.outputs_of(original, inputs) for inputs in expected.inputs]
    return expected


def compare(component: str, model: bytes | Path, expected: Expected, precision: str) -> dict[str, float]:
    """Run a graph in ONNX Runtime against its original's outputs; returns the worst figures, or `ParityError`."""
    spread = float(expected.outputs[0][0].std())  # of ordinary inputs; those of flat tiles hardly vary
    with OnnxRuntimeSession(model) as session:
        pairs = zip(expected.outputs, expected.inputs, strict=True)
        measured = [parity.measure(outputs, session, inputs, spread) for outputs, inputs in pairs]
    figures = max(measured, key=lambda one: one["relative"])
    parity.check(component, figures, precision)
    return figures


def tool_versions() -> dict[str, str]:
    """Return the versions of what made the plan."""
    packages = ("pfstorer-rt", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")
    return {name: version(name) for name in packages} | {"opset": str(OPSET), "onnx_ir": str(onnx.IR_VERSION)}
