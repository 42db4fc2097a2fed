"""Copies of networks that share the memory of their weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def share_weights(module: ModuleT, memo: dict[int, Any] | None = None) -> ModuleT:
    """Return a copy of a module that shares the memory of its parameters and buffers.

    The copy has its own submodules: converting or moving it, or replacing its layers, does not change the original.
    Only in-place changes of values affect both. memo: pass one dictionary to several calls, so that submodules shared
    between modules stay shared between their copies.
    """
    memo = {} if memo is None else memo
    for parameter in module.parameters():
        memo.setdefault(id(parameter), nn.Parameter(parameter.detach(), parameter.requires_grad))
    for buffer in module.buffers():
        memo.setdefault(id(buffer), buffer.detach())
    return deepcopy(module, memo)
