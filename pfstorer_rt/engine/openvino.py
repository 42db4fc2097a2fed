"""The OpenVINO backend (extra `openvino`): runs ONNX payloads; the fastest backend on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pfstorer_rt.arrays import HostArray
from pfstorer_rt.engine.compiled import make_cache_folder
from pfstorer_rt.engine.session import Closed, Session, not_loaded
from pfstorer_rt.errors import MissingBackendError, SettingError
from pfstorer_rt.extras import install
from pfstorer_rt.plan import Plan

PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""Precision of the computation -> name of the matching OpenVINO device capability."""


def check() -> None:
    """Raise `MissingBackendError` unless OpenVINO can be imported."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingBackendError(f"openvino is not installed: {install('openvino')}") from error


class OpenVinoSession(Session):
    """An OpenVINO session of one ONNX payload, or of a model file with external weights.

    If only the batch size is dynamic, the session compiles one network per power of two and pads smaller batches,
    because networks with fixed shapes are faster.
    provider: a device and an optional precision, such as `CPU`, `CPU:f32` or `GPU:f16`. The default precision is bf16
    if the device supports it natively, else f32. cache: folder of compiled networks.
    """

    def __init__(self, model: bytes | Path, provider: str | None = None, cache: Path | None = None) -> None:
        """Raise `MissingBackendError` for an unavailable device or precision, `ValueError` for an unknown precision."""
        import openvino

        self._core: Any = openvino.Core()
        device, _, precision = (provider or "CPU").partition(":")
        _check_device(self._core, device)
        given = {"model": model} if isinstance(model, Path) else {"model": model, "weights": b""}
        self._network: Any = self._core.read_model(**given)
        operators = {op.get_type_name() for op in self._network.get_ops()}
        quantized = "FakeQuantize" in operators
        self._rounded: Any = self._network.clone() if quantized else None
        if quantized:
            drop_unread_roundings(self._network)
        precision = precision or ("bf16" if self._computes(device, "bf16") else "f32")
        if precision not in PRECISIONS:
            message = f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}"
            raise SettingError(message, setting="provider")
        if not self._computes(device, precision):  # OpenVINO would silently use f32
            message = f"OpenVINO {device} does not compute in {precision} here; take {device}:f32"
            raise MissingBackendError(message, setting="provider")
        self._device = device.upper()
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if cache:  # one folder per precision: OpenVINO 2026.4 loads a cached fp32 network for bf16 and returns NaN
            self._settings["CACHE_DIR"] = str(cache / precision)
        self.inputs = tuple(port.get_any_name() for port in self._network.inputs)
        self.outputs = tuple(port.get_any_name() for port in self._network.outputs)
        free = {i for port in self._network.inputs for i, d in enumerate(port.partial_shape) if d.is_dynamic}
        self._ladder = free == {0}
        self._compiled: dict[int, Any] = {}
        self.provider = f"OpenVINO {openvino.get_version().split('-')[0]} {self._device} {precision}"
        self.provider += " and int8" if quantized else ""
        if not self._ladder:
            self._compile(0)

    def compute(self, **arrays: HostArray) -> dict[str, HostArray]:
        """Compute all outputs from all inputs, by name."""
        batch = len(arrays[self.inputs[0]]) if self._ladder else 0
        step = 1 << (batch - 1).bit_length() if batch else 0
        filled = {name: _fill(array, step) if len(array) == batch else array for name, array in arrays.items()}
        results = self._compile(step)(filled)
        return {name: results[name][: batch or None].copy() for name in self.outputs}

    def _computes(self, device: str, precision: str) -> bool:
        """Whether a device supports a precision natively; all devices support f32."""
        able = self._core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
        return precision == "f32" or PRECISIONS[precision] in able

    def _compile(self, batch: int) -> Any:
        """Return the network for a batch size, compiled at first use; 0 is the network with dynamic shapes."""
        if batch not in self._compiled:
            network = self._network.clone()
            if batch:
                free = {port.get_any_name(): port.partial_shape for port in network.inputs}
                network.reshape({n: [batch if d.is_dynamic else d for d in shape] for n, shape in free.items()})
            try:
                self._compiled[batch] = self._core.compile_model(network, self._device, self._settings)
            except RuntimeError:  # OpenVINO 2026.4 cannot compile some networks without these operators
                if self._rounded is None:
                    raise
                self._network, self._rounded = self._rounded, None
                return self._compile(batch)
        return self._compiled[batch]

    def close(self) -> None:
        """Free the engine."""
        self._compiled.clear()
        self._network = self._rounded = self._core = Closed()


def drop_unread_roundings(network: Any) -> None:
    """Remove the FakeQuantize operators whose results no convolution or matrix product reads.

    ONNX Runtime computes an operator in 8 bits only if its result is quantized too. OpenVINO does not need a quantized
    result: without it, the following operators run in bf16 or fp32, which is more accurate and faster.
    """
    for rounding in network.get_ordered_ops():
        if rounding.get_type_name() == "FakeQuantize":
            readers = _readers(_end_of_rounding(rounding))
            if not any(reader.get_node().get_type_name() in ("Convolution", "MatMul") for reader in readers):
                for reader in readers:
                    reader.replace_source_output(rounding.input_value(0))


def _end_of_rounding(rounding: Any) -> Any:
    """Return the last operator of a quantization chain, the multiplication by the scale."""
    last = rounding
    while last.get_type_name() in ("FakeQuantize", "Convert", "Subtract") and len(readers := _readers(last)) == 1:
        last = next(iter(readers)).get_node()
    return last


def _readers(op: Any) -> Any:
    return op.output(0).get_target_inputs() if op.get_output_size() else set()


def _check_device(core: Any, device: str) -> None:
    available = core.available_devices
    if not any(name.split(".")[0] == device.upper().split(".")[0] for name in available):
        message = f"OpenVINO device {device}: not here; it sees {', '.join(available)}"
        raise MissingBackendError(message, setting="provider")


def _fill(array: HostArray, batch: int) -> HostArray:
    """Repeat the last row to fill the batch."""
    missing = batch - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, 0)]) if missing > 0 else array


def open_component(plan: Plan, component: str, provider: str | None = None) -> OpenVinoSession:
    """Open a component of an ONNX plan; raises `BadFileError` if OpenVINO cannot load it."""
    cache = make_cache_folder("openvino", plan)
    try:
        if plan.manifest.payloads[component].weights:  # OpenVINO reads external weights only from files
            with plan.unpack(component) as path:
                return OpenVinoSession(path, provider, cache)
        return OpenVinoSession(plan.read(component), provider, cache)
    except RuntimeError as error:
        raise not_loaded(plan, component, "OpenVINO", error) from error
