"""The session interface, which runs one component of a plan, and the choice of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pfstorer_rt.arrays import Array, HostArray
from pfstorer_rt.errors import BadFileError, MissingBackendError, PFStorerError, SettingError, one_line
from pfstorer_rt.extras import needed_by
from pfstorer_rt.files import show_path
from pfstorer_rt.plan import Plan

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class Session(ABC):
    """One component that is ready to run. A context manager that closes the engine on exit.

    An engine computes with arrays of its own kind. Here they are numpy arrays; `TensorSession` has tensors on a device.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    provider: str
    """Device or library that runs the component, such as `CPUExecutionProvider`."""
    tile_batch: int = 4
    """Tiles in one batch, where the settings name no number."""

    @abstractmethod
    def compute(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name, on arrays of the engine's kind, without a copy to the host."""

    def place(self, array: Array) -> Array:
        """Convert an array to the engine's kind."""
        return np.ascontiguousarray(array)

    def fetch(self, array: Array) -> HostArray:
        """Convert an array of the engine's kind to a numpy array."""
        return np.asarray(array)

    def run(self, **arrays: HostArray) -> dict[str, HostArray]:
        """Compute all outputs from all inputs, by name, on numpy arrays."""
        outputs = self.compute(**{name: self.place(array) for name, array in arrays.items()})
        return {name: self.fetch(array) for name, array in outputs.items()}

    def close(self) -> None:  # noqa: B027 (an engine without resources of its own has nothing to free)
        """Free the engine; the session cannot run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Closed:
    """Takes the place of an engine that was freed; every use raises `SettingError`."""

    def __getattr__(self, name: str) -> object:
        raise SettingError("this engine is closed; open the plan again")


class TensorSession(Session):
    """A session of an engine that computes with PyTorch tensors."""

    device: torch.device
    """Device of the tensors."""

    def place(self, array: Array) -> torch.Tensor:
        """Convert a numpy array, or a tensor of any device, to a tensor on `device`; memory is shared if possible."""
        import torch

        host = np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array
        return torch.as_tensor(host, device=self.device)

    def fetch(self, array: Array) -> HostArray:
        """Convert a tensor to a numpy array of float32."""
        values: HostArray = array.float().cpu().numpy()
        return values


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of an engine means too little memory, judged by its type or text."""
    words = (
        "out of memory", "outofmemory", "bad_alloc", "bad allocation", "can't alloc", "failed to allocate",
        "alloc_failed", "memoryallocation", "resource temporarily unavailable",  # the last: no memory for a thread
    )  # fmt: skip
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def not_loaded(plan: Plan, component: str, library: str, error: Exception) -> PFStorerError:
    """Return the error for a component that a library cannot load: too little memory, or a damaged payload."""
    name = show_path(plan.path)
    if out_of_memory(error):
        return PFStorerError(f"{name}: too little memory to load the {component}; close other programs")
    return BadFileError(f"{name}: {library} cannot load the {component} ({one_line(error)})")


class Backend(NamedTuple):
    """A library that runs plans: its module here, and the targets of the plans that it runs.

    The module has `check() -> None` and `open_component(plan, component, provider) -> Session`. It is imported only
    when the backend is chosen.
    """

    module: str
    targets: tuple[str, ...]


BACKENDS = {
    "tensorrt": Backend("pfstorer_rt.engine.tensorrt", ("tensorrt", "tensorrt-rtx")),
    "openvino": Backend("pfstorer_rt.engine.openvino", ("onnx",)),
    "onnxruntime": Backend("pfstorer_rt.engine.onnxruntime", ("onnx",)),
}
"""Backends that run a plan, in the order in which `auto` tries them; `auto_order` moves ONNX Runtime with CUDA up.

PyTorch is not a backend: `engine.torch` runs a base and an identity, not the payloads of a plan.
"""


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend, and the reason why each other backend was rejected."""

    name: str
    open_component: Callable[[Plan, str, str | None], Session]
    """open_component(plan, component, provider); provider None is the backend's default."""
    refused: Mapping[str, str] = field(default_factory=dict)


def auto_order(target: str) -> list[str]:
    """Return the backends for a target, fastest first: ONNX Runtime precedes OpenVINO if it has CUDA."""
    names = [name for name, backend in BACKENDS.items() if target in backend.targets]
    if "onnxruntime" in names and import_module(BACKENDS["onnxruntime"].module).on_gpu():
        names.remove("onnxruntime")
        names.insert(0, "onnxruntime")
    return names


def choose_backend(name: str = "auto", target: str = "onnx") -> BackendChoice:
    """Choose a backend by name, or with `auto` the first installed backend that runs plans of `target`.

    Raises `ValueError` for an unknown name. Raises `MissingBackendError` if the named backend cannot be used, or with
    `auto` if no backend can be used.
    """
    if name != "auto" and name not in BACKENDS:
        raise SettingError(f"backend {name!r}: expected auto, torch or one of {', '.join(BACKENDS)}", setting="backend")
    if name != "auto" and target not in BACKENDS[name].targets:
        raise MissingBackendError(
            f"backend {name} runs plans of target {' or '.join(BACKENDS[name].targets)}, "
            f"this one was built for {target}"
        )
    refused: dict[str, str] = {}
    for candidate in auto_order(target) if name == "auto" else (name,):
        try:
            with needed_by(f"backend {candidate}", target):
                module = import_module(BACKENDS[candidate].module)
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
