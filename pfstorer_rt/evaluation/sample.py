"""What metrics take: images, weight files, and the types of their functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from pfstorer_rt.imaging.rows import Pixels

T = TypeVar("T")


class Sample:
    """An image with cached results, so that several metrics share one face detection.

    pixels: (H, W, 3) float32 in [0, 1].
    """

    def __init__(self, pixels: Pixels) -> None:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype.kind != "f":
            raise ValueError(f"pixels {pixels.shape} {pixels.dtype}; expected (H, W, 3) float in [0, 1]")
        if not pixels.size or not np.isfinite(pixels).all():
            raise ValueError(f"pixels {pixels.shape} that are empty, NaN or infinite; expected numbers in [0, 1]")
        self.pixels = pixels
        self._known: dict[Hashable, object] = {}

    def once(self, function: Callable[[Pixels], T]) -> T:
        """Return `function(pixels)`, computed at the first call."""
        if function not in self._known:
            self._known[function] = function(self.pixels)
        return self._known[function]  # type: ignore[return-value]


Measure = Callable[[Sample, Sample, Sequence[Sample]], "float | None"]
"""measure(result, original, references) -> value, or None if the metric is not defined for these images."""


@dataclass(frozen=True)
class MetricFiles:
    """Weight files that the user provides; None for a missing file."""

    arcface: Path | None = None
    """A face recognizer of the ArcFace family as ONNX: (1, 3, 112, 112) in, an embedding out."""
    arcface_range: Literal["-1..1", "0..1", "0..255"] = "-1..1"
    """Range of the values that the recognizer takes."""
    alexnet: Path | None = None
    """torchvision's AlexNet weights (alexnet-owt-7be5be79.pth), the backbone of LPIPS."""
    musiq: Path | None = None
    """pyiqa's MUSIQ weights (musiq_koniq_ckpt-e95806b9.pth); without the file pyiqa downloads them."""
    lpips: Path | None = None
    """LPIPS as one ONNX file: two images (1, 3, H, W) in [-1, 1] in, a distance out; used instead of the package."""
    landmarks: Path | None = None
    """A landmark network as ONNX: (1, 3, 112, 112) in [-1, 1] in, 98 points (x, y) in 0..1 out (WFLW)."""
    niqe: Path | None = None
    """Parameters of NIQE: the authors' modelparameters.mat, or niqe_pris_params.npz of the package basicsr."""


Load = Callable[[MetricFiles], Measure]
"""load(files) -> measure; raises `MissingBackendError` that names the package to install or the file to provide."""
