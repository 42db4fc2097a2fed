"""Copies of networks that share the memory of their weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def share_weights(module: ModuleT, memo: dict[int, Any] | None = None) -> ModuleT:
    """Return a copy of a module whose parameters and buffers share the memory of the module's own.

    The copy has its own submodules: to convert or move it, or to replace its layers, leaves the module as it is. Only
    a change of values in place reaches both. memo: passed to several calls, it keeps what these modules have in common.
    """
    memo = {} if memo is None else memo
    for parameter in module.parameters():
        memo.setdefault(id(parameter), nn.Parameter(parameter.detach(), parameter.requires_grad))
    for buffer in module.buffers():
        memo.setdefault(id(buffer), buffer.detach())
    return deepcopy(module, memo)
