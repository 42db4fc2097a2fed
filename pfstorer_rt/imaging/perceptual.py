"""LPIPS and ST-LPIPS: perceptual distances between two images, computed on AlexNet features."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pfstorer_rt.errors import BadFileError, MissingBackendError, one_line
from pfstorer_rt.extras import install
from pfstorer_rt.imaging.rows import Pixels

SMALLEST = 32
"""Minimum side in pixels; AlexNet's last feature map is empty below it."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def shift_tolerant_distance() -> PerceptualDistance:
    """Shift-tolerant LPIPS with AlexNet (Ghildyal and Liu 2022, section 4), weights of `stlpips_pytorch`.

    Raises MissingBackendError if the package is missing.
    """
    path = package_file("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth", install("metrics"))
    weights = read_weights(path)
    return PerceptualDistance(shift_tolerant_slices(weights), linear_weights(weights))


class PerceptualDistance(nn.Module):
    """Weighted squared difference of unit-length features, averaged over positions and summed over slices."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, slices: Sequence[nn.Module], linear: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.slices = nn.ModuleList(slices)
        self.linear = nn.ParameterList(linear)
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of each slice, normalized to length 1 at every position.

        images: (B, 3, H, W) in [-1, 1].
        """
        x, found = (images - self.shift) / self.scale, []
        for part in self.slices:
            x = part(x)
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def between(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distances (B,) between two lists of features."""
        return torch.stack(
            [((x - y).square() * w).sum(1).mean((1, 2)) for x, y, w in zip(a, b, self.linear, strict=True)]
        ).sum(0)


def alexnet_slices(weights: dict[str, torch.Tensor], path: Path) -> list[nn.Module]:
    """Split AlexNet after each of its five ReLUs; weights have torchvision's names (`features.N.weight`)."""
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, 1, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1),
        nn.ReLU(),
    )
    own = {key.removeprefix("features."): value for key, value in weights.items() if key.startswith("features.")}
    try:
        layers.load_state_dict(own)
    except RuntimeError as error:
        raise BadFileError(f"{path}: not torchvision's AlexNet weights ({one_line(error)})") from error
    return cut(layers, (2, 5, 8, 10, 12))


def shift_tolerant_slices(weights: dict[str, torch.Tensor]) -> list[nn.Module]:
    """AlexNet of ST-LPIPS: stride 1 in the first convolution, a reflect-padded blur before each reduction."""
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 1, 2),
        blur(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 1),
        blur(64),
        nn.Conv2d(64, 192, 5, 1, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 1),
        blur(192),
        nn.Conv2d(192, 384, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1),
        nn.ReLU(),
    )
    for name, layer in layers.named_children():
        if isinstance(layer, nn.Conv2d):
            part = next(key for key in weights if key.endswith(f".{name}.weight")).removesuffix("weight")
            layer.load_state_dict({"weight": weights[part + "weight"], "bias": weights[part + "bias"]})
    return cut(layers, (3, 7, 11, 13, 15))


def blur(channels: int) -> nn.Module:
    """Binomial blur [1 2 1] x [1 2 1] / 16 with stride 2 and two pixels of reflect padding."""
    layer = nn.Conv2d(channels, channels, 3, 2, 2, groups=channels, bias=False, padding_mode="reflect")
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    layer.weight.data.copy_(torch.outer(line, line))
    layer.requires_grad_(False)
    return nn.Sequential(layer)  # wrapped, because the caller loads weights into every plain Conv2d


def cut(layers: Any, ends: Sequence[int]) -> list[nn.Module]:
    """Split a sequence of layers before each of the indices."""
    starts = (0, *ends)
    return [layers[start:end].eval() for start, end in zip(starts, ends, strict=False)]


def linear_weights(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the five (1, C, 1, 1) channel weights, one per slice."""
    return [weights[f"lin{i}.model.1.weight"] for i in range(5)]


def package_file(package: str, name: str, advice: str) -> Path:
    """Find a file of an installed package without importing the package; lpips imports torchvision."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise MissingBackendError(f"{package} is not installed; {advice}")
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read PyTorch weights without running pickled code; raises BadFileError for any other file."""
    try:
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many exception types on damaged files
        raise BadFileError(f"{path}: not readable; expected a file of PyTorch weights: copy it again") from error
    return weights


def torchvision_alexnet() -> dict[str, torch.Tensor]:
    """Load AlexNet's ImageNet weights through torchvision, from its cache or by download."""
    advice = "give torchvision's AlexNet weights, alexnet-owt-7be5be79.pth"
    try:
        from torchvision.models import AlexNet_Weights

        weights: dict[str, torch.Tensor] = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
    except Exception as error:  # torchvision is missing or incompatible, or the download failed
        raise MissingBackendError(f"{advice} ({one_line(error)})") from error
    return weights


def to_planes(pixels: Pixels) -> torch.Tensor:
    """(H, W, 3) in [0, 1] -> (1, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)) * 2 - 1
