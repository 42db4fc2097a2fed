"""PyTorch as an engine: the base and the identity themselves, the reference that plans are compared with."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn

from pfstorer_rt.engine.session import Array, numpy_run
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.components import component_modules, component_names
from pfstorer_rt.plan import COMPONENTS


class TorchSession:
    """A module whose forward takes `inputs` in order and returns `outputs` in order."""

    def __init__(
        self, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], device: torch.device
    ) -> None:
        self.module, self.inputs, self.outputs, self.device = module.eval(), inputs, outputs, device
        self.provider = f"PyTorch {torch.__version__} {device}"

    def run(self, **arrays: Array) -> dict[str, Array]:
        """Compute all outputs from all inputs, by name."""
        return numpy_run(self, arrays)

    @torch.no_grad()
    def run_tensors(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Do the same on tensors of `device`."""
        result = self.module(*(tensors[name].to(self.device) for name in self.inputs))
        outputs = result if isinstance(result, tuple) else (result,)
        return {name: tensor.float() for name, tensor in zip(self.outputs, outputs, strict=True)}

    def __enter__(self) -> TorchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_sessions(base: Base, identity: Identity | None = None, attention: str = "auto") -> dict[str, TorchSession]:
    """Open all components of a base, with an identity or without, on a backend of `pfstorer_rt.ops`."""
    modules = component_modules(base, identity)
    base.set_attention(attention, modules["denoiser"])
    strength = bool(getattr(modules["denoiser"], "has_strength", False))
    return {c: TorchSession(modules[c], *component_names(c, base, strength), base.device) for c in COMPONENTS}
