"""The device of PyTorch, checked before it is used, and the default precision of the networks on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pfstorer_rt.errors import MissingBackendError, SettingError, one_line

PRECISIONS = ("auto", "fp32", "fp16")
"""Precisions of the networks; auto: fp16 on a GPU that computes it faster, else fp32."""


@dataclass(frozen=True)
class DeviceChoice:
    """The chosen device; `refused` is the reason why a GPU that exists is not used."""

    device: torch.device
    refused: str | None = None


def choose_device(name: str = "auto") -> DeviceChoice:
    """Choose a device by name (`cpu`, `cuda`, `cuda:N`), or with `auto` the current GPU if it works, else the CPU.

    Raises `SettingError` for an unknown name, `MissingBackendError` for a GPU that is missing or does not work.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return DeviceChoice(torch.device("cpu"))
        fault = find_fault(torch.device("cuda"))
        return DeviceChoice(torch.device("cpu" if fault else "cuda"), fault)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device {name!r}: expected auto, cpu, cuda or cuda:N", setting="device")
    if device.type == "cpu":
        return DeviceChoice(device)
    if not torch.cuda.is_available():
        raise MissingBackendError(f"device {name}: torch finds no CUDA device; use device cpu", setting="device")
    if fault := find_fault(device):
        raise MissingBackendError(f"device {name}: {fault}; use device cpu", setting="device")
    return DeviceChoice(device)


def find_fault(device: torch.device) -> str | None:
    """Return why a GPU that torch finds cannot compute; None if it can.

    A GPU that is too old or too new for the build of torch, out of memory or in exclusive use fails at its first
    kernel only.
    """
    try:
        value = float((torch.ones(8, device=device) * 2).sum())
    except Exception as error:  # torch, CUDA and drivers have their own exception types
        return f"the GPU cannot be used ({one_line(error)})"
    return None if value == 16 else f"the GPU computes wrong values ({value} for 16)"


def choose_precision(name: str, device: torch.device) -> Literal["fp32", "fp16"]:
    """Return the precision of the networks on a device; raises `SettingError` for an unknown name.

    auto: fp16 on GPUs of compute capability 7.0 and later, which have matrix units for it.
    """
    if name not in PRECISIONS:
        raise SettingError(f"precision {name!r}: expected one of {', '.join(PRECISIONS)}", setting="precision")
    if name == "fp16" or (
        name == "auto" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 7
    ):
        return "fp16"
    return "fp32"
