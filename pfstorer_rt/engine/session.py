"""The session interface, which runs one component of a plan, and the choice of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.errors import MissingBackendError, SettingError
from pfstorer_rt.plan import Plan

if TYPE_CHECKING:
    from typing_extensions import Self

Array = npt.NDArray[Any]


class Session(ABC):
    """One component that is ready to run. A context manager that closes the engine on exit."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    provider: str
    """Device or library that runs the component, such as `CPUExecutionProvider`."""
    device: torch.device
    """Device of the tensors of `run_tensors`."""
    tile_batch: int = 4
    """Tiles in one batch, where the settings name no number."""

    @abstractmethod
    def run(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name."""

    @abstractmethod
    def run_tensors(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute all outputs from all inputs, by name, on tensors of `device`, without a copy through the host."""

    def close(self) -> None:  # noqa: B027 (an engine without resources of its own has nothing to free)
        """Free the engine; the session cannot run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HostSession(Session):
    """A session of an engine that uses host memory. Tensors and arrays share memory."""

    device = torch.device("cpu")

    def run_tensors(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute all outputs from all inputs, by name."""
        outputs = self.run(**{name: tensor.contiguous().numpy() for name, tensor in tensors.items()})
        return {name: torch.from_numpy(array) for name, array in outputs.items()}


class TensorSession(Session):
    """A session of an engine that uses tensors. Arrays are copied to the device and back."""

    def run(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {name: tensor.float().cpu().numpy() for name, tensor in self.run_tensors(**tensors).items()}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of an engine means too little memory, judged by its type or text."""
    words = ("out of memory", "bad_alloc", "bad allocation", "can't allocate memory", "failed to allocate")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


BACKENDS: dict[str, str] = {
    "tensorrt": "pfstorer_rt.engine.tensorrt",
    "openvino": "pfstorer_rt.engine.openvino",
    "onnxruntime": "pfstorer_rt.engine.onnxruntime",
}
"""Backends that run a plan, in the order in which `auto` tries them; `auto_order` moves ONNX Runtime with CUDA up.

A backend is a module with `TARGETS` (the supported plan targets), `check() -> None` and
`open_component(plan, component, provider) -> Session`. PyTorch is not a backend: `engine.torch` runs a base and an
identity, not the payloads of a plan.
"""


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend, and the reason why each other backend was rejected."""

    name: str
    open_component: Callable[[Plan, str, str | None], Session]
    """open_component(plan, component, provider); provider None is the backend's default."""
    refused: Mapping[str, str] = field(default_factory=dict)


def auto_order() -> list[str]:
    """Return the backends, fastest first: ONNX Runtime precedes OpenVINO if it has CUDA."""
    names = list(BACKENDS)
    if import_module(BACKENDS["onnxruntime"]).on_gpu():
        names.remove("onnxruntime")
        names.insert(names.index("openvino"), "onnxruntime")
    return names


def choose_backend(name: str = "auto", target: str = "onnx") -> BackendChoice:
    """Choose a backend by name, or with `auto` the first installed backend that runs plans of `target`.

    Raises `ValueError` for an unknown name. Raises `MissingBackendError` if the named backend cannot be used, or with
    `auto` if no backend can be used.
    """
    if name != "auto" and name not in BACKENDS:
        raise SettingError(f"backend {name!r}: expected auto, torch or one of {', '.join(BACKENDS)}", setting="backend")
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

    provider: the backend's name for a device or library; None is the backend's default.
    Raises as `choose_backend` does, and `BadFileError` if the payload is damaged.
    """
    return choose_backend(backend, plan.manifest.target).open_component(plan, component, provider)
