"""LPIPS as a training loss, with weights that the user provides.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", section 3 and the
authors' release 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.errors import BadFileError

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation of red, green and blue in [-1, 1], for the normalization of the input."""
EPSILON = 1e-10

Layer = tuple[int, int, int, int, int]
"""Input and output channels, kernel side, stride, and padding of a convolution; ReLU follows each."""


def _vgg(entry: int, width: int, count: int) -> list[Layer]:
    return [(entry if i == 0 else width, width, 3, 1, 1) for i in range(count)]


VGG16: list[list[Layer]] = [_vgg(3, 64, 2), _vgg(64, 128, 2), _vgg(128, 256, 3), _vgg(256, 512, 3), _vgg(512, 512, 3)]
ALEXNET: list[list[Layer]] = [
    [(3, 64, 11, 4, 2)],
    [(64, 192, 5, 1, 2)],
    [(192, 384, 3, 1, 1)],
    [(384, 256, 3, 1, 1)],
    [(256, 256, 3, 1, 1)],
]
POOLED = {"vgg16": {1: 2, 2: 2, 3: 2, 4: 2}, "alexnet": {1: 3, 2: 3}}
"""Stages that begin with max-pooling of stride 2, with the window size."""


class Lpips(nn.Module):
    """VGG16 or AlexNet up to its last convolution, and the weights of LPIPS.

    path: NPZ file of `conv{i}.weight`, `conv{i}.bias` and `lin{0..4}`; 13 convolutions are VGG16, five are AlexNet.
    Raises `BadFileError` for any other file. The weights are frozen.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        tensors = read_npz(path)
        count = sum(name.endswith(".weight") for name in tensors)
        if count not in (5, 13) or any(f"lin{i}" not in tensors for i in range(5)):
            raise BadFileError(f"{path}: expected the weights of LPIPS (conv0.weight ... lin4) of VGG16 or AlexNet")
        stages = VGG16 if count == 13 else ALEXNET
        self.pooled = POOLED["vgg16" if count == 13 else "alexnet"]
        self.stages = nn.ModuleList(nn.ModuleList(nn.Conv2d(*layer) for layer in stage) for stage in stages)
        self.weights = nn.ParameterList(tensors[f"lin{i}"] for i in range(5))
        convolutions = [c for stage in self.stages for c in stage]  # type: ignore[attr-defined]
        for i, convolution in enumerate(convolutions):
            weight, bias = tensors[f"conv{i}.weight"], tensors[f"conv{i}.bias"]
            if weight.shape != convolution.weight.shape:
                raise BadFileError(
                    f"{path}: conv{i} has shape {tuple(weight.shape)}, expected {tuple(convolution.weight.shape)}"
                )
            convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps of the five stages, after their last ReLU, of (B, 3, H, W) in [-1, 1]."""
        h = (image - self.shift) / self.scale
        maps = []
        for i, stage in enumerate(self.stages):
            if i in self.pooled:
                h = F.max_pool2d(h, self.pooled[i], 2)
            for convolution in stage:  # type: ignore[attr-defined]
                h = F.relu(convolution(h))
            maps.append(h)
        return maps

    def between(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        """Return the distance (B,) of two images from their `features`, scaled by `normalize`."""
        total = torch.zeros(len(a[0]), device=a[0].device)
        for x, y, weight in zip(a, b, self.weights, strict=True):
            difference = x - y
            total = total + F.conv2d(difference * difference, weight.to(x.dtype)).float().mean((1, 2, 3))
        return total

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the distance (B,) of two images (B, 3, H, W) in [-1, 1]."""
        return self.between(normalize(self.features(a)), normalize(self.features(b)))


def normalize(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Scale the channels of every pixel of each (B, C, H, W) to length 1.

    A convolution sums the squares, which needs few passes over large maps and keeps their dtype.
    """
    scaled = []
    for x in maps:
        energy = F.conv2d(x * x, x.new_ones(1, x.shape[1], 1, 1)).float()
        scaled.append(x * (energy + EPSILON).rsqrt().to(x.dtype))
    return scaled


def read_npz(path: Path) -> dict[str, nn.Parameter]:
    """Read the arrays of an NPZ file as fp32; raises `BadFileError` for a file that cannot be read."""
    try:
        with np.load(path) as file:
            return {name: nn.Parameter(torch.from_numpy(file[name].astype(np.float32))) for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise BadFileError(f"{path}: not a readable NPZ file ({error})") from error
