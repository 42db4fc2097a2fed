"""The door to the engines: what a session is, which backends there are, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.errors import MissingBackendError, SettingError
from pfstorer_rt.plan import Plan

Array = npt.NDArray[Any]


class Session(Protocol):
    """One component, ready to run. A context manager that frees the engine on exit."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    provider: str
    """What really runs it, such as `CPUExecutionProvider`."""
    device: torch.device
    """Where `run_tensors` takes and gives tensors."""

    def run(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name."""
        ...

    def run_tensors(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Do the same on tensors of `device`, without a copy over the host (and DLPack, which tensors speak)."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class HostSession:
    """What engines that compute on the host's memory share: tensors are arrays that need no copy."""

    device = torch.device("cpu")

    def run(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name."""
        raise NotImplementedError

    def run_tensors(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Do the same on tensors."""
        outputs = self.run(**{name: tensor.contiguous().numpy() for name, tensor in tensors.items()})
        return {name: torch.from_numpy(array) for name, array in outputs.items()}


def numpy_run(session: Session, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Run a session whose own way is tensors on numpy arrays."""
    outputs = session.run_tensors(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()})
    return {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}


def out_of_memory(error: BaseException) -> bool:
    """Whether an engine failed for want of memory, as far as its message tells."""
    words = ("out of memory", "bad_alloc", "bad allocation", "can't allocate memory", "failed to allocate")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


BACKENDS: dict[str, str] = {
    "tensorrt": "pfstorer_rt.engine.tensorrt",
    "openvino": "pfstorer_rt.engine.openvino",
    "onnxruntime": "pfstorer_rt.engine.onnxruntime",
}
"""Backends that run a plan, in the order in which `auto` tries them, but for ONNX Runtime with CUDA (`auto_order`).

Each is a module with `TARGETS`, the kinds of plan it runs, `check() -> None` and
`open_component(plan, component, provider) -> Session`. PyTorch is no entry: it runs the base and the identity
themselves (`engine.torch`), not the plan's payloads.
"""


@dataclass(frozen=True)
class BackendChoice:
    """The backend that was taken and why the others were not."""

    name: str
    open_component: Callable[[Plan, str, str | None], Session]
    """open_component(plan, component, provider); provider None takes the backend's best."""
    refused: Mapping[str, str] = field(default_factory=dict)


def auto_order() -> list[str]:
    """Return the backends in the order of their speed here: ONNX Runtime comes before OpenVINO where it has a GPU."""
    names = list(BACKENDS)
    if import_module(BACKENDS["onnxruntime"]).on_gpu():
        names.remove("onnxruntime")
        names.insert(names.index("openvino"), "onnxruntime")
    return names


def choose_backend(name: str = "auto", target: str = "onnx") -> BackendChoice:
    """Take a backend by name, or with `auto` the first that is installed, among those that run plans of `target`.

    Raises `ValueError` for an unknown name, `MissingBackendError` when the named one, or every one, cannot be used.
    """
    if name != "auto" and name not in BACKENDS:
        raise SettingError(f"backend {name!r}: expected auto, torch or one of {', '.join(BACKENDS)}")
    refused: dict[str, str] = {}
    for candidate in auto_order() if name == "auto" else (name,):
        try:
            module = import_module(BACKENDS[candidate])
            if target not in module.TARGETS:
                if name == "auto":
                    continue
                raise MissingBackendError(
                    f"backend {name} runs plans of target {' or '.join(module.TARGETS)}, "
                    f"this one was built for {target}"
                )
            module.check()
            return BackendChoice(candidate, module.open_component, refused)
        except MissingBackendError as error:
            refused[candidate] = str(error)
    raise MissingBackendError("; ".join(refused.values()) or f"no backend runs plans that were built for {target}")


def open_session(plan: Plan, component: str, backend: str = "auto", provider: str | None = None) -> Session:
    """Open one component of a plan (`encoder`, `denoiser` or `decoder`).

    provider: where the backend runs it, in its own words; None takes its best.
    Raises as `choose_backend` does, and `BadFileError` when the payload is damaged.
    """
    return choose_backend(backend, plan.manifest.target).open_component(plan, component, provider)
