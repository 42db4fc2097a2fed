"""The door to the engines: what a session is, which backends there are, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

import numpy.typing as npt

from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.plan import Plan

Array = npt.NDArray[Any]


class Session(Protocol):
    """One component, ready to run. A context manager that frees the engine on exit."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    provider: str
    """What really runs it, such as `CPUExecutionProvider`."""

    def run(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


BACKENDS: dict[str, str] = {
    "onnxruntime": "pfstorer_rt.engine.onnxruntime",
    "openvino": "pfstorer_rt.engine.openvino",
}
"""Backends that run a plan: module with `check() -> None` and `open_component(plan, component) -> Session`.

PyTorch is no entry: it runs the base and the identity themselves (`engine.torch`), not the plan's payloads.
"""
PREFERENCE = ("onnxruntime", "openvino")
"""The order in which `auto` tries them."""


@dataclass(frozen=True)
class BackendChoice:
    """The backend that was taken and why the others were not."""

    name: str
    open_component: Callable[[Plan, str], Session]
    refused: Mapping[str, str] = field(default_factory=dict)


def choose_backend(name: str = "auto") -> BackendChoice:
    """Take a backend by name, or with `auto` the first of `PREFERENCE` that is installed.

    Raises `ValueError` for an unknown name, `MissingBackendError` when the named one cannot be used.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend {name!r}: expected auto, torch or one of {', '.join(BACKENDS)}")
    refused: dict[str, str] = {}
    for candidate in PREFERENCE if name == "auto" else (name,):
        try:
            module = import_module(BACKENDS[candidate])
            module.check()
            return BackendChoice(candidate, module.open_component, refused)
        except MissingBackendError as error:
            refused[candidate] = str(error)
    raise MissingBackendError("; ".join(refused.values()))


def open_session(plan: Plan, component: str, backend: str = "auto") -> Session:
    """Open one component of a plan (`encoder`, `denoiser` or `decoder`).

    Raises as `choose_backend` does, and `BadFileError` when the payload is damaged.
    """
    return choose_backend(backend).open_component(plan, component)
