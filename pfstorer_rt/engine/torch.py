"""The PyTorch engine: runs a base and an identity directly, and is the reference for plans."""

from __future__ import annotations

import torch

from pfstorer_rt.engine.session import TensorSession
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.components import Component, components


class TorchSession(TensorSession):
    """A session of one PyTorch component."""

    def __init__(self, component: Component, device: torch.device) -> None:
        self.module, self.device = component.module.eval(), device
        self.inputs, self.outputs = component.inputs, component.outputs
        self.provider = f"PyTorch {torch.__version__}, {device}"

    @torch.no_grad()
    def compute(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute all outputs from all inputs, by name."""
        result = self.module(*(tensors[name] for name in self.inputs))
        outputs = result if isinstance(result, tuple) else (result,)
        return {name: tensor.float() for name, tensor in zip(self.outputs, outputs, strict=True)}


def open_sessions(
    base: Base, identity: Identity | None = None, attention: str = "auto", device: str | torch.device | None = None
) -> dict[str, TorchSession]:
    """Open all components of a base, with or without an identity, on a backend of `pfstorer_rt.ops`.

    device: None is the device of the base, `auto` a GPU if there is one. The sessions share the weights of the base,
    but not its device or kernels.
    """
    base = base.copy()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = base if device is None else base.to(device)
    parts = components(base, identity)
    base.set_attention(attention, parts["denoiser"].module)
    return {name: TorchSession(component, base.device) for name, component in parts.items()}
