"""Memory layouts that the kernels take: tensors with a dense last axis, and their strides."""

from __future__ import annotations

import torch


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with a dense last axis, copied if necessary; the other strides are arbitrary."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (rows, C) with a dense last axis."""
    return dense(tensor.flatten(0, -2))


def strides(*tensors: torch.Tensor) -> list[int]:
    """Return the strides of the first three axes of each tensor, as the kernels take them."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
