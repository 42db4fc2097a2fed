"""Where the faces of a photograph are (dlib, extra `metrics`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pfstorer_rt.evaluation.metrics import Pixels, dlib_landmarks, face_models, to_uint8
from pfstorer_rt.image import from_tensor, resize_bicubic, to_tensor

SIDES = 512, 1024
"""Bounds of the longer side in pixels at which faces are looked for: dlib finds those of 80 pixels and more."""


class Face(NamedTuple):
    """The square box of a face, from the brows to the chin, in pixels of its photograph."""

    left: float
    top: float
    side: float


def face_finder() -> Callable[[Pixels], list[Face]] | None:
    """Return a function picture (H, W, 3) in [0, 1] -> its faces, the largest first; None without `metrics`."""
    folder = face_models()
    if folder is None:
        return None
    detector, _ = dlib_landmarks(folder)

    def find(pixels: Pixels) -> list[Face]:
        longer = max(pixels.shape[:2])
        scale = float(np.clip(longer, *SIDES)) / longer
        image = to_uint8(_resized(pixels, scale))
        boxes = detector(image, 0) or detector(image, 1)
        faces = [Face(box.left() / scale, box.top() / scale, box.width() / scale) for box in boxes]
        return sorted(faces, key=lambda face: -face.side)

    return find


def _resized(pixels: Pixels, scale: float) -> Pixels:
    if scale == 1:
        return pixels
    height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
    return from_tensor(resize_bicubic(to_tensor(pixels), (height, width), antialias=scale < 1))
