"""The PyTorch engine: runs a base and an identity directly.

On a CPU it runs the networks as they were trained, and is the reference for plans. On a GPU it runs the networks of an
export: constants folded, fp16 with some parts in fp32 (`models.precision`), channels-last, replayed as CUDA graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from pfstorer_rt.device import choose_precision
from pfstorer_rt.engine.cuda import Cuda
from pfstorer_rt.engine.graphs import Graphed
from pfstorer_rt.engine.session import TensorSession
from pfstorer_rt.files import cache_home
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import Base
from pfstorer_rt.models.components import Component, components
from pfstorer_rt.models.fuse import fuse_denoiser
from pfstorer_rt.models.precision import TypedComponent
from pfstorer_rt.models.sharing import share_weights

GPU_TILES = 16
"""Tiles in one batch on a GPU. Where the memory is too small for them, the batch is halved (`TiledDenoiser`)."""


class TorchSession(TensorSession):
    """A session of one PyTorch component."""

    def __init__(self, component: Component, device: torch.device, precision: str = "fp32") -> None:
        self.module, self.device = component.module.eval(), device
        self.inputs, self.outputs = component.inputs, component.outputs
        self.provider = f"PyTorch {torch.__version__}, {device}, {precision}"
        self.network: Callable[..., tuple[torch.Tensor, ...]] = self._compute

    def run_graphs(self, cuda: Cuda) -> None:
        """Replay the network as CUDA graphs."""
        self.network = Graphed(self._compute, cuda)
        self.tile_batch = GPU_TILES

    @torch.no_grad()
    def compute(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute all outputs from all inputs, by name."""
        outputs = self.network(*(tensors[name] for name in self.inputs))
        return dict(zip(self.outputs, outputs, strict=True))

    def close(self) -> None:
        """Free the graphs."""
        if isinstance(self.network, Graphed):
            self.network.clear()
            self.network = self._compute

    def _compute(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(*inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(tensor.float() for tensor in outputs)


class HalfSession(TorchSession):
    """A session in fp16 of a component that runs once per image.

    The decoders of some bases overflow in fp16. A result that is not finite is computed again in fp32, and so is every
    later one.
    """

    def __init__(self, component: Component, device: torch.device, original: Callable[[], TorchSession]) -> None:
        """original: opens the same component in fp32."""
        super().__init__(component, device, "fp16")
        self._open = original
        self._full: TorchSession | None = None

    def compute(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute all outputs from all inputs, by name."""
        if self._full is None:
            outputs = super().compute(**tensors)
            if all(bool(torch.isfinite(tensor).all()) for tensor in outputs.values()):
                return outputs
            self.close()
            self._full = self._open()
            self.provider = self._full.provider
        return self._full.compute(**tensors)


def open_sessions(
    base: Base,
    identity: Identity | None = None,
    attention: str = "auto",
    device: str | torch.device | None = None,
    precision: str = "fp32",
    compiled: bool = False,
) -> dict[str, TorchSession]:
    """Open all components of a base, with or without an identity, on a backend of `pfstorer_rt.ops`.

    device: None is the device of the base. precision: `fp32`, `fp16`, or `auto` for the device's. compiled: compile
    the networks with Inductor, whose results are kept in the cache directory. The sessions share the weights of the
    base, but not its device or kernels.
    """
    base = base.copy()
    base = base if device is None else base.to(device)
    parts = components(base, identity)
    base.set_attention(attention, parts["denoiser"].module)
    if choose_precision(precision, base.device) == "fp16":
        sessions = {name: open_half(component, base.device) for name, component in parts.items()}
    else:
        sessions = {name: TorchSession(component, base.device) for name, component in parts.items()}
    for session in sessions.values():
        if compiled:
            compile_network(session.module)
        if base.device.type == "cuda":
            session.run_graphs(Cuda(base.device))
    return sessions


def open_half(component: Component, device: torch.device) -> TorchSession:
    """Open a component in fp16, with folded constants and channels-last; the component is not changed."""
    if component.every_step:
        fused = fuse_denoiser(component)
        return TorchSession(fused.with_module(half(fused.module)), device, "fp16")
    typed = component.with_module(half(share_weights(component.module)))
    return HalfSession(typed, device, lambda: TorchSession(component, device))


def half(module: nn.Module) -> nn.Module:
    """Return a network with fp32 inputs and outputs that computes in fp16; it is changed in place."""
    typed = TypedComponent(module, "fp16", native=True)
    return typed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compile_network(module: nn.Module) -> None:
    """Compile a network with Inductor at its first run of each shape; compiled code is kept in the cache directory."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_home() / "inductor"))
    module.compile(dynamic=False)
