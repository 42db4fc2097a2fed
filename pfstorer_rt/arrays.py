"""The two operations that numpy arrays and PyTorch tensors do not share; PyTorch is imported for tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

HostArray = npt.NDArray[Any]
"""A numpy array."""
Array = Any
"""A numpy array, or a PyTorch tensor on any device."""


def like(values: HostArray, example: Array) -> Array:
    """Convert a numpy array to the kind of `example`: its library, its type and its device."""
    if isinstance(example, np.ndarray):
        return values.astype(example.dtype, copy=False)
    return example.new_tensor(values)


def stack(parts: Sequence[Array]) -> Array:
    """Stack arrays of one kind and shape along a new first axis."""
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts)
    import torch

    return torch.stack(tuple(parts))
