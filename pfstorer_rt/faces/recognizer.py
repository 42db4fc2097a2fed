"""dlib's face recognizer as a PyTorch network, so that the distance between two faces has a gradient."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.faces.finding import dlib_shape, find_largest
from pfstorer_rt.imaging.rows import Pixels

SIDE = 150
"""Side in pixels of the network's input."""
BLOCKS = (*[(32, 1)] * 3, (64, 2), *[(64, 1)] * 3, (128, 2), *[(128, 1)] * 2, (256, 2), *[(256, 1)] * 2, (256, 2))
"""Channels and stride of each residual block (dlib's examples/dnn_face_recognition_ex.cpp)."""
STAGES = (6, 9, 12)
"""Blocks after which `embed` also returns the map: 17, 8 and 4 pixels a side, for eyes, face parts and the face."""
MEAN = (122.782, 117.001, 104.298)
"""Mean of red, green and blue in 0..255, which dlib subtracts before it divides by 256."""


class FaceRecognizer(nn.Module):
    """dlib's ResNet-29, (B, 3, 150, 150) in [0, 1] -> (B, 128); a distance under 0.6 means the same person.

    path: `RECOGNIZER` in the folder of dlib's weights. The affine layers are folded into the convolutions before them.
    Raises `BadFileError` for a file of another network.
    """

    mean: torch.Tensor
    projection: torch.Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        convolutions, width = [nn.Conv2d(3, 32, 7, 2)], 32
        for channels, stride in BLOCKS:
            convolutions.append(nn.Conv2d(width, channels, 3, stride, padding=1 if stride == 1 else 0))
            convolutions.append(nn.Conv2d(channels, channels, 3, 1, padding=1))
            width = channels
        self.convolutions = nn.ModuleList(convolutions)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1) / 255, persistent=False)
        tensors = list(read_tensors(path))
        sizes = [n for c in convolutions for n in (c.weight.numel() + c.out_channels, 2 * c.out_channels)]
        if [len(t) for t in tensors] != [*sizes, width * 128]:
            raise BadFileError(f"{path}: does not hold dlib's face recognizer; install face_recognition_models again")
        for convolution, weights, affine in zip(convolutions, tensors[0:-1:2], tensors[1::2], strict=True):
            scale, shift = affine.chunk(2)
            kernel, bias = weights.split([convolution.weight.numel(), convolution.out_channels])
            convolution.weight = nn.Parameter(kernel.reshape(convolution.weight.shape) * scale[:, None, None, None])
            convolution.bias = nn.Parameter(bias * scale + shift)
        self.register_buffer("projection", tensors[-1].reshape(width, 128), persistent=False)
        self.requires_grad_(False)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Embed aligned faces (B, 3, 150, 150) in [0, 1]: (B, 128), not normalised."""
        return self.embed(faces)[0]

    def embed(self, faces: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Embed aligned faces, with the feature maps (B, C, H, W) after the blocks `STAGES`."""
        maps = []
        convolutions = iter(self.convolutions)
        x = F.max_pool2d(F.relu(next(convolutions)((faces - self.mean) * (255 / 256))), 3, 2)
        for block, (_, stride) in enumerate(BLOCKS):
            residual = next(convolutions)(x)
            residual = next(convolutions)(F.relu(residual))
            x = F.relu(add_padded(residual, x if stride == 1 else F.avg_pool2d(x, 2, 2)))
            if block in STAGES:
                maps.append(x)
        return x.mean((2, 3)) @ self.projection, maps


def add_padded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add two (B, C, H, W) of different sizes like dlib: the smaller one is padded with zeros."""
    channels, height, width = (max(a.shape[i], b.shape[i]) for i in (1, 2, 3))
    a, b = (F.pad(z, (0, width - z.shape[3], 0, height - z.shape[2], 0, channels - z.shape[1])) for z in (a, b))
    return a + b


def read_tensors(path: Path) -> Iterator[torch.Tensor]:
    """Yield the weights of every layer, flat, in the order of computation, from dlib's own file format.

    A layer starts with its name. A tensor consists of a version, four sizes, and its values as little-endian fp32.
    """
    data = path.read_bytes()
    for layer in re.finditer(rb"\x05con_4|\x07affine_|\x04fc_2", data):
        position = layer.end()
        for _ in range(3 if layer.group().endswith(b"fc_2") else 1):  # fc: outputs and inputs before the version
            _, position = read_integer(data, position)
        count = 1
        for _ in range(4):
            size, position = read_integer(data, position)
            count *= size
        if position + 4 * count > len(data):
            return
        yield torch.from_numpy(np.frombuffer(data, "<f4", count, position).copy())


def read_integer(data: bytes, position: int) -> tuple[int, int]:
    """Read dlib's integer, a length byte and that many bytes; return it and the position after it."""
    end = position + 1 + (data[position] & 15)
    return int.from_bytes(data[position + 1 : end], "little"), end


def face_map(pixels: Pixels) -> npt.NDArray[np.float32] | None:
    """Return the position of the recognizer's input square around the largest face of an image (H, W, 3) in [0, 1].

    The position is an affine map (2, 3) from the square to the image, both in [-1, 1], an input of `F.affine_grid`.
    None without a face. Raises `MissingBackendError` when the `metrics` extra is not installed.
    """
    box = find_largest(pixels)
    if box is None:
        return None
    import dlib

    chip = dlib.get_face_chip_details(dlib_shape(pixels, box), SIDE, 0.25)
    height, width = pixels.shape[:2]
    left, top = chip.rect.left(), chip.rect.top()
    cos, sin = np.cos(chip.angle), np.sin(chip.angle)
    size, sides = np.array([width, height]), np.array([chip.rect.width(), chip.rect.height()])
    turn = np.array([[cos, -sin], [sin, cos]]) * sides / 2
    middle = np.array([left, top]) + sides / 2
    return np.concatenate([turn / (size[:, None] / 2), (middle / (size / 2) - 1)[:, None]], 1).astype(np.float32)


def cut_faces(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Crop (B, 3, H, W) to the faces at maps (B, 2, 3) of `face_map`; returns (B, 3, 150, 150)."""
    grid = F.affine_grid(maps, [len(images), 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
