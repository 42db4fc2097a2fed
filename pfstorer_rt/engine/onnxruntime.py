"""The ONNX Runtime backend: runs on CUDA if the build and the machine support it, else on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfstorer_rt.arrays import HostArray
from pfstorer_rt.engine.session import Session
from pfstorer_rt.errors import BadFileError, MissingBackendError, one_line
from pfstorer_rt.files import show_path
from pfstorer_rt.plan import Plan


def check() -> None:
    """Raise `MissingBackendError` unless ONNX Runtime can be imported."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingBackendError("onnxruntime is not installed: pip install onnxruntime") from error


def providers(wanted: str | None = None) -> list[str]:
    """Return the execution providers for a session, fastest first.

    wanted: the provider to put first, by full or short name (`CPUExecutionProvider` or `cpu`).
    Raises `MissingBackendError` for a provider that this build does not have.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    usual = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    if wanted is None:
        return usual
    names = {p.lower(): p for p in available} | {p.removesuffix("ExecutionProvider").lower(): p for p in available}
    if wanted.lower() not in names:
        hint = "; only the backend openvino takes a precision after a colon" if ":" in wanted else ""
        raise MissingBackendError(
            f"ONNX Runtime provider {wanted}: not in this build; it has {', '.join(available)}{hint}",
            setting="provider",
        )
    return list(dict.fromkeys([names[wanted.lower()], "CPUExecutionProvider"]))


def on_gpu() -> bool:
    """Whether ONNX Runtime is installed with CUDA."""
    try:
        return providers()[0].startswith("CUDA")
    except ImportError:
        return False


class OnnxRuntimeSession(Session):
    """An ONNX Runtime session of one ONNX payload, or of a model file with external weights.

    The session uses the defaults of ONNX Runtime (all graph optimizations, the memory arena, one thread per core) with
    one change: the threads stop spinning at the end of a run. By default they continue to spin and slow down the next
    session; on two cores an image took twice as long. `benchmarks/engine_options.py` compares other settings.
    """

    def __init__(
        self, model: bytes | Path, provider: str | None = None, *, weights: Mapping[str, memoryview] | None = None
    ) -> None:
        """Load a graph. weights: {file name: bytes} of its external data; ONNX Runtime copies the bytes."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if weights:
            sizes = [len(data) for data in weights.values()]
            options.add_external_initializers_from_files_in_memory([*weights], [*weights.values()], sizes)
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=providers(provider))
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())
        self.provider: str = self._session.get_providers()[0]

    def compute(self, **arrays: HostArray) -> dict[str, HostArray]:
        """Compute all outputs from all inputs, by name."""
        return dict(zip(self.outputs, self._session.run(None, arrays), strict=True))

    def close(self) -> None:
        """Free the engine."""
        self._session = None


def open_component(plan: Plan, component: str, provider: str | None = None) -> OnnxRuntimeSession:
    """Open a component of an ONNX plan; raises `BadFileError` if ONNX Runtime cannot load it."""
    data = plan.read(component)
    providers(provider)
    try:
        with plan.map_weights(component) as weights:
            return OnnxRuntimeSession(data, provider, weights=weights)
    except Exception as error:  # ONNX Runtime has one exception type per status
        reason = one_line(error)
        raise BadFileError(f"{show_path(plan.path)}: ONNX Runtime cannot load the {component} ({reason})") from error
