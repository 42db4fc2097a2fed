"""Device and precision of a training with accelerate; the state of the caller's process and base is restored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.device import DeviceChoice, choose_device
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.models.base import Base
from pfstorer_rt.ops import training_backend


@contextmanager
def accelerated(settings: TrainConfig, base: Base | None = None) -> Iterator[Accelerator]:
    """Start accelerate, seed torch with `settings.seed`, and put `base` on the device with kernels for training.

    Afterwards torch's random states, accelerate's process-wide state, and the base's device, kernels, memory layout,
    modes and `requires_grad` are restored. Trained weights keep their new values.
    Raises `MissingBackendError` when the machine does not support `settings`, such as fp16 on a CPU.
    """
    with own_accelerate_state(), nullcontext() if base is None else borrowed(base):
        accelerator = make_accelerator(settings)
        with seeded(settings.seed, accelerator.device):
            if base is not None:
                base.to(accelerator.device).set_attention(kernels_for(settings, accelerator.device))
            yield accelerator


def kernels_for(settings: TrainConfig, device: torch.device) -> str:
    """Return the backend of `pfstorer_rt.ops` that a training uses; `auto` is the fastest on the device."""
    return training_backend(device) if settings.attention == "auto" else settings.attention


def training_device(settings: TrainConfig) -> DeviceChoice:
    """Choose the device of a training; raises `MissingBackendError` if it is missing or cannot use the precision."""
    chosen = choose_device(settings.device)
    if chosen.device.type == "cpu" and settings.precision == "fp16":
        raise MissingBackendError("fp16 training needs a GPU; on a CPU use bf16 or fp32", setting="precision")
    return chosen


def make_accelerator(settings: TrainConfig) -> Accelerator:
    """Start accelerate for a device and a precision; use it inside `own_accelerate_state`.

    A GPU that does not work is logged, and the CPU is used. Raises `MissingBackendError` if the GPU was asked for.
    """
    chosen = training_device(settings)
    if chosen.refused:
        logging.getLogger(__name__).warning("%s; training on the CPU", chosen.refused)
    cpu = chosen.device.type == "cpu"
    wanted: str = settings.precision
    if wanted == "auto":
        wanted = "bf16" if has_native_bf16(cpu) else "fp32"
    return Accelerator(mixed_precision="no" if wanted == "fp32" else wanted, cpu=cpu)


def has_native_bf16(cpu: bool) -> bool:
    """Whether bf16 is fast here: on a CPU with AVX512-BF16 or AMX, on a GPU of compute capability 8 or later."""
    if not cpu:
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Give accelerate a fresh process-wide state, and restore the caller's state afterwards.

    accelerate keeps the device and precision of the first `Accelerator` for the whole process and refuses others.
    """
    singletons = (PartialState, AcceleratorState, GradientState)
    before = [dict(singleton._shared_state) for singleton in singletons]
    for singleton in singletons:
        singleton._shared_state.clear()
    try:
        yield
    finally:
        for singleton, values in zip(singletons, before, strict=True):
            singleton._shared_state.clear()
            singleton._shared_state.update(values)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of `device`, and restore their states afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would also seed unused GPUs
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def borrowed(base: Base) -> Iterator[None]:
    """Restore the device, kernels, memory layout, modes and `requires_grad` of a base afterwards."""
    device, modules = base.device, [m for network in base.modules().values() for m in network.modules()]
    modes = [(module, module.training) for module in modules]
    kernels = [(m, name, vars(m)[name]) for m in modules for name in ("kernels", "processor") if name in vars(m)]
    parameters = [(p, p.requires_grad, p.is_contiguous()) for m in modules for p in m.parameters(recurse=False)]
    try:
        yield
    finally:
        base.to(device)
        for module, training in modes:
            module.training = training
        for module, name, value in kernels:
            setattr(module, name, value)
        for parameter, requires_grad, contiguous in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.data = parameter.data.contiguous() if contiguous else parameter.data


def to_channels_last(module: nn.Module) -> None:
    """Store the convolution weights of a module channels-last, which makes convolutions faster."""
    nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]
