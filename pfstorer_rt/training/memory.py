"""Less memory for large bases: frozen weights in half precision, recomputed activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.models.unet import RestorationUNet

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def saving_memory(objective: nn.Module, config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """Keep frozen weights in the training's precision, and recompute activations if `gradient_checkpointing` is set."""
    unets = [m for m in objective.modules() if isinstance(m, RestorationUNet)] if config.gradient_checkpointing else []
    for unet in unets:
        unet.enable_gradient_checkpointing()
    try:
        with frozen_weights_in(objective, _DTYPES.get(accelerator.mixed_precision)):
            yield
    finally:
        for unet in unets:
            unet.disable_gradient_checkpointing()


@contextmanager
def frozen_weights_in(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Convert the frozen linear and convolution layers to `dtype`, and restore their values afterwards.

    Autocast would convert them at every use and keep a copy for each backward pass. Meanwhile the originals stay in CPU
    memory. dtype: None changes nothing.
    """
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))] if dtype else []
    frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
    devices, originals = [p.device for p in frozen], [p.data.cpu() for p in frozen]
    try:
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, device, original in zip(frozen, devices, originals, strict=True):
            parameter.data = original.to(device)
