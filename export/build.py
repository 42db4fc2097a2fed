"""`export_plan`: convert a base and an identity to one checked plan file."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir
import torch

from pfstorer_rt.arrays import HostArray
from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.engine.session import choose_backend
from pfstorer_rt.errors import MismatchError, MissingBackendError, ParityError, SettingError
from pfstorer_rt.files import make_folder, real_path, sha256_bytes, sha256_file, work_folder
from pfstorer_rt.identity import Identity, identity_path
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.models.components import Component, components, manifest
from pfstorer_rt.plan import DEFAULT_BASE, SHIPPED, Manifest, Payload, Plan, move_plan, write_plan

from . import parity
from .graph import SELF_CONTAINED, Graph, build_graph, fuse
from .parity import TIMESTEPS, probe_inputs
from .progress import Phase, Progress, each, ignore
from .quantize import SAMPLES, calibration_inputs, quantize
from .tensorrt import BuildOptions, EngineBuilder
from .trace import OPSET

TARGETS = ("onnx", "tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "int8")
ORDINARY = ((1, 1), (3, 2))
"""`batch` and `part` of the example inputs for the check of every export; `probe_inputs` come after them."""
DEFAULT_PRECISION = {"onnx": "fp32", "tensorrt": "fp16", "tensorrt-rtx": "fp16"}
"""Precision for `auto`: fp16 where the hardware computes it faster."""


@dataclass
class Expected:
    """Inputs of a component with the outputs of its PyTorch original."""

    inputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    outputs: list[list[HostArray]] = field(default_factory=list)
    largest: float = 0.0

    @property
    def ordinary(self) -> Expected:
        """The inputs for the check of every precision."""
        return Expected(self.inputs[: len(ORDINARY)], self.outputs[: len(ORDINARY)])

    @property
    def probes(self) -> Expected:
        """The inputs for the check of fp16 and int8 only."""
        return Expected(self.inputs[len(ORDINARY) :], self.outputs[len(ORDINARY) :])


@dataclass
class Exported:
    """A component's graph on disk, before it becomes a payload."""

    component: str
    scales: Mapping[str, int]
    """`Component.scales`."""
    model: Path
    """The ONNX file, with `weights` beside it."""
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    precision: str
    origins: dict[str, str]
    figures: dict[str, float] = field(default_factory=dict)
    message: bytes | None = None
    """The model as one ONNX message, for a small graph that becomes an ONNX payload."""

    @property
    def weights(self) -> Path:
        """The file of the graph's constants."""
        return self.model.with_name(f"{self.component}.weights")

    @property
    def engine(self) -> Path:
        """The file of an engine."""
        return self.model.with_name("engine")


def resolve(identity: str | Path | Identity | None, base: str | Path | Base | None) -> tuple[Base, Identity | None]:
    """Load an identity and a base; base None selects the identity's base.

    Raises `MismatchError` when the identity was trained on another base, or when its base is not a shipped base.
    """
    if identity is not None and not isinstance(identity, Identity):
        identity = Identity.load(identity_path(identity))
    named = base if base is not None else (identity.base_name if identity else DEFAULT_BASE)
    if base is None and identity is not None and identity.base_name not in SHIPPED:
        raise MismatchError(
            f"identity {identity.name!r} was learned on base {identity.base_name!r} "
            f"({identity.base_fingerprint[:12]}), which is not shipped; give its directory as the base"
        )
    loaded = named if isinstance(named, Base) else load_base(named)
    if identity is not None:
        identity.check_base(loaded.fingerprint)
    return loaded, identity


def export_plan(
    output: str | Path,
    identity: str | Path | Identity | None = None,
    base: str | Path | Base | None = None,
    target: str = "onnx",
    precision: str = "auto",
    options: BuildOptions | None = None,
    progress: Progress | None = None,
    check: Callable[[Plan], None] | None = None,
) -> Plan:
    """Fuse, export, check, build and write a plan; a missing folder is made. A base object is not changed.

    identity: name, file or object; None exports the base alone. base: name, directory or object; None selects the
    identity's base. precision: `fp32`, `fp16`, `int8` (ONNX only) or `auto` (fp32 for ONNX, fp16 for TensorRT);
    with fp16 an encoder or decoder that would overflow or differ from PyTorch stays in fp32.
    options: options of the TensorRT engines.
    check: called with the finished plan before it is moved to `output`. If this machine cannot run engines of `target`,
    it is called with an ONNX plan of the same graphs before the engines are built. An exception from it ends the
    export.
    Raises `ParityError`, and writes nothing, when a component differs from PyTorch; `MissingBackendError` when
    TensorRT is not installed.
    """
    output, progress = Path(output), progress or Progress()
    precision = choose_precision(target, precision)
    builder = None if target == "onnx" else EngineBuilder(target, options or BuildOptions(), progress.phase)
    loaded, identity = resolve(identity, base)
    loaded = loaded.copy().to("cpu", torch.float32)  # a base object is not changed
    loaded.set_attention("sdpa")  # the kernels of the base object run PyTorch, and are no part of a graph
    described = replace(
        manifest(loaded, identity, target, precision),
        tools=tool_versions(),
        compute_capabilities=builder.capabilities if builder else [],
    )
    if builder:
        described.tools[target] = builder.library.version
    make_folder(real_path(output).parent)
    with work_folder(near=real_path(output).parent) as folder:
        exported = export_components(loaded, identity, precision, builder is None, Path(folder), progress)
        del loaded  # a builder needs several times the memory of the weights
        gc.collect()
        runnable = not_run(target) is None
        if check and not runnable:
            progress.line("checking the graphs")
            check(write_graphs(Path(folder) / "graphs.plan", described, exported))
        entries = {one.component: describe_payload(one, builder, described.tile, progress) for one in exported}
        described = replace(described, payloads=entries, strength="strength" in entries["denoiser"].inputs)
        files = {one.component: one.engine if builder else one.message or one.model for one in exported}
        weights = {one.component: one.weights for one in exported if entries[one.component].weights}
        if check is None or not runnable:
            return write_plan(output, described, files, weights)
        progress.line("checking the plan")
        draft = write_plan(Path(folder) / "draft.plan", described, files, weights)
        check(draft)
        return move_plan(draft, output)


def choose_precision(target: str, precision: str) -> str:
    """Return the precision of a plan's graphs, with `auto` resolved; raises `ValueError` for an unknown combination."""
    if target not in TARGETS or precision not in ("auto", *PRECISIONS):
        raise SettingError(
            f"target {target!r}, precision {precision!r}: expected one of {TARGETS} and of {('auto', *PRECISIONS)}",
            setting="target" if target not in TARGETS else "precision",
        )
    precision = DEFAULT_PRECISION[target] if precision == "auto" else precision
    if precision == "int8" and target != "onnx":
        message = f"precision int8 with target {target!r}: only ONNX plans, for CPUs, have 8-bit operators"
        raise SettingError(message, setting="precision")
    return precision


def export_components(
    base: Base, identity: Identity | None, precision: str, onnx_target: bool, folder: Path, progress: Progress
) -> list[Exported]:
    """Export all components of a base and an identity, each to its own folder.

    Weights of the base are rounded or freed as soon as possible.
    """
    parts, exported, probes = components(base, identity), [], []
    for component in parts.values():
        progress.line(f"{component.name}: exporting")
        expected, computed = expect(component, precision, progress.phase), precision
        if precision == "int8":
            probes.append(expected.probes)
            expected, computed = expected.ordinary, "fp32"
        if component.every_step and precision == "fp16":
            halve_weights(base)  # nothing below needs fp32, and the weights of a large base are gigabytes
        exported.append(export_component(component, computed, expected, onnx_target, folder / component.name, progress))
    if precision != "int8":
        return exported
    drop_weights(base)
    chain = zip(exported, parts.values(), probes, strict=True)
    return [quantize_component(one, component, probe, progress) for one, component, probe in chain]


def not_run(target: str) -> str | None:
    """Return why no backend on this machine can run plans of a target; None if one can."""
    try:
        choose_backend("auto", target)
    except MissingBackendError as error:
        return str(error)
    return None


def write_graphs(path: Path, described: Manifest, exported: list[Exported]) -> Plan:
    """Write the graphs of engines as an ONNX plan."""
    entries = {one.component: graph_payload(one) for one in exported}
    strength = "strength" in entries["denoiser"].inputs
    described = replace(described, target="onnx", payloads=entries, strength=strength)
    files = {one.component: (one.model, one.weights) for one in exported}
    models, weights = ({name: pair[i] for name, pair in files.items()} for i in (0, 1))
    return write_plan(path, described, models, weights)


def export_component(
    component: Component, precision: str, expected: Expected, onnx_target: bool, folder: Path, progress: Progress
) -> Exported:
    """Export one component to a folder and check it in ONNX Runtime.

    A component that does not work in fp16 is exported in fp32 if it runs once per image, and is refused if it runs at
    every step.
    """
    if precision == "fp16" and not parity.fits_halves(expected.largest):
        reach = f"{component.name}: its values reach {expected.largest:.3g}, too near the largest half, 65504"
        if component.every_step:
            raise ParityError(f"{reach}; export with precision fp32", setting="precision")
        progress.line(f"{reach}; it stays in fp32")
        precision = "fp32"
    # TensorRT has no fused kernel for fp32 attention.
    fused_attention = onnx_target or precision == "fp16"
    graph = build_graph(fuse(component), precision, "constants", fused_attention, not onnx_target, progress.phase)
    exported = saved(component, graph, folder, precision, onnx_target)
    del graph
    gc.collect()  # reference cycles in exported programs keep their weights
    exported.figures = compare(exported.model, expected, component.name, progress.phase)
    if precision == "fp16" and not component.every_step and not parity.within(exported.figures, precision):
        progress.line(f"{component.name}: {parity.describe(exported.figures, precision)}; it stays in fp32")
        # Checked like any fp32 export: the probes are for fp16, and ONNX Runtime is inexact on flat tiles in fp32.
        return export_component(component, "fp32", expected.ordinary, onnx_target, folder, progress)
    return checked(exported, progress)


def quantize_component(exported: Exported, component: Component, probes: Expected, progress: Progress) -> Exported:
    """Convert an fp32 graph to 8 bits and measure its difference on the probes."""
    progress.line(f"{component.name}: measuring the ranges of its activations")
    inputs = calibration_inputs(component if "strength" in exported.inputs else component.without_strength())
    with TemporaryDirectory(dir=exported.model.parent) as folder:
        measured = each(inputs, f"{component.name}: measuring ranges", progress.phase, SAMPLES)
        written = quantize(exported.model, measured, Path(folder) / "int8.onnx")
        low = saved(component, Graph(onnx_ir.load(written), exported.origins), exported.model.parent, "int8")
    low.figures = compare(low.model, probes, component.name, progress.phase)
    return checked(low, progress)


def saved(component: Component, graph: Graph, folder: Path, precision: str, onnx_target: bool = True) -> Exported:
    """Write a graph to a folder."""
    inputs, outputs = graph.ports()
    model = graph.save(folder, f"{component.name}.weights")
    exported = Exported(component.name, component.scales, model, inputs, outputs, precision, graph.origins)
    if onnx_target and graph.weight_bytes() <= SELF_CONTAINED:
        exported.message = graph.to_bytes()
    return exported


def checked(exported: Exported, progress: Progress) -> Exported:
    """Return a component if its figures are within the limit; raises `ParityError` otherwise."""
    parity.check(exported.component, exported.figures, exported.precision)
    off = parity.judged(exported.figures, exported.precision)
    progress.line(f"{exported.component}: {exported.precision}, {parity.MEASURE[exported.precision]} {off:.1e}")
    return exported


def describe_payload(exported: Exported, builder: EngineBuilder | None, tile: int, progress: Progress) -> Payload:
    """Describe an exported component's payload; with a builder, build its engine first."""
    e = exported
    if builder is None:
        return graph_payload(e)
    progress.line(f"{e.component}: building for {builder.library.target}")
    built = builder.build(e.component, e.origins, e.model, tile, e.scales, e.engine)
    return Payload(
        f"{e.component}.engine",
        sha256_file(e.engine),
        e.inputs,
        e.outputs,
        e.figures,
        e.precision,
        built.profiles,
        built.layers,
    )


def graph_payload(e: Exported) -> Payload:
    """Describe an exported component as an ONNX payload: one message, or a graph with its weights in another file."""
    file = f"{e.component}.onnx"
    if e.message is not None:
        return Payload(file, sha256_bytes(e.message), e.inputs, e.outputs, e.figures, e.precision)
    return Payload(
        file,
        sha256_file(e.model),
        e.inputs,
        e.outputs,
        e.figures,
        e.precision,
        weights=e.weights.name,
        weights_sha256=sha256_file(e.weights),
    )


def halve_weights(base: Base) -> None:
    """Round the matrices and kernels of UNet and structure encoder to fp16, which halves their memory."""
    for module in (base.unet, base.structure_encoder):
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "time_embedding" not in name:
                parameter.data = parameter.data.half()


def drop_weights(base: Base) -> None:
    """Free the weights of UNet and structure encoder; the ranges of graphs need only the autoencoder."""
    for module in (base.unet, base.structure_encoder):
        for parameter in module.parameters():
            parameter.data = parameter.data.new_empty(0)
    gc.collect()


def expect(component: Component, precision: str, phase: Phase = ignore) -> Expected:
    """Run an unfused component on the inputs for the check of its export."""
    original = component.module.eval()
    expected = Expected([component.example_inputs(*shape) for shape in ORDINARY])
    ordinary = each(expected.inputs, f"{component.name}: running PyTorch", phase)
    expected.outputs = [parity.outputs_of(original, inputs) for inputs in ordinary]
    if precision != "fp32":
        # int8 is for photographs: flat tiles differ at the last timesteps, where the prediction has little effect.
        names = ("photo",) if precision == "int8" else tuple(TIMESTEPS)
        probes = probe_inputs(component, names).values()
        for inputs in each(probes, f"{component.name}: running PyTorch on probes", phase):
            outputs, largest = parity.outputs_and_largest(original, inputs)
            expected.inputs.append(inputs)
            expected.outputs.append(outputs)
            expected.largest = max(expected.largest, largest)
    return expected


def compare(model: bytes | Path, expected: Expected, name: str = "graph", phase: Phase = ignore) -> dict[str, float]:
    """Compare a graph in ONNX Runtime with its original's outputs; returns the worst figures.

    name: subject of the progress.
    """
    spread = float(expected.outputs[0][0].std())  # of ordinary inputs; outputs of flat tiles are nearly constant
    with OnnxRuntimeSession(model) as session:
        pairs = list(zip(expected.outputs, expected.inputs, strict=True))
        measured = [
            parity.measure(outputs, session, inputs, spread)
            for outputs, inputs in each(pairs, f"{name}: comparing with PyTorch", phase)
        ]
    return max(measured, key=lambda one: one["relative"])


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that made the plan."""
    packages = ("pfstorer-rt", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")
    return {name: version(name) for name in packages} | {"opset": str(OPSET), "onnx_ir": str(onnx.IR_VERSION)}
