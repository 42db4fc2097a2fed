"""OpenVINO on a CPU: runs the same ONNX payloads (extra `openvino`)."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pfstorer_rt.engine.session import Array, HostSession
from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.files import show_path
from pfstorer_rt.plan import Plan

TARGETS = ("onnx",)


def check() -> None:
    """Raise `MissingBackendError` unless OpenVINO can be imported."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingBackendError("openvino is not installed: pip install 'pfstorer-rt[openvino]'") from error


class OpenVinoSession(HostSession):
    """One ONNX payload, or a file with its weights beside it, compiled by OpenVINO, in fp32."""

    def __init__(self, model: bytes | Path) -> None:
        import openvino

        core = openvino.Core()
        network = core.read_model(model) if isinstance(model, Path) else core.read_model(model=model, weights=b"")
        hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        self._compiled: Any = core.compile_model(network, "CPU", hints)
        self.inputs = tuple(port.get_any_name() for port in self._compiled.inputs)
        self.outputs = tuple(port.get_any_name() for port in self._compiled.outputs)
        self.provider = f"OpenVINO {openvino.get_version().split('-')[0]} CPU"

    def run(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name."""
        results = self._compiled({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        return {name: results[name].copy() for name in self.outputs}

    def __enter__(self) -> OpenVinoSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._compiled = None


def open_component(plan: Plan, component: str) -> OpenVinoSession:
    """Open a component of an ONNX plan; raises `BadFileError` when OpenVINO cannot load it."""
    try:
        if plan.manifest.payloads[component].weights:  # OpenVINO reads them from a file only
            with plan.unpack(component) as path:
                return OpenVinoSession(path)
        return OpenVinoSession(plan.read(component))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise BadFileError(f"{show_path(plan.path)}: OpenVINO cannot load the {component} ({reason})") from error
