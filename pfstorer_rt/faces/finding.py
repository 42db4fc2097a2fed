"""Where the faces of a photograph are, and whose (dlib, extra `metrics`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pfstorer_rt.faces.dlib import Embedding, dlib_landmarks, dlib_recognizer, face_models, to_uint8
from pfstorer_rt.imaging.files import from_tensor, resize_bicubic, to_tensor
from pfstorer_rt.imaging.rows import Pixels

LEAST = 512
"""Longer side in pixels below which a picture is enlarged before faces are looked for."""
LONGER_SIDES = (1024, 2048, 4096)
"""What a larger picture is shrunk to, one after the other until a face is found: dlib sees those of 80 pixels."""


class Face(NamedTuple):
    """The square box of a face, from the brows to the chin, in pixels of its photograph, and whose it is."""

    left: float
    top: float
    side: float
    embedding: Embedding


def face_finder() -> Callable[[Pixels], list[Face]] | None:
    """Return a function picture (H, W, 3) in [0, 1] -> its faces, the largest first; None without `metrics`."""
    folder = face_models()
    if folder is None:
        return None
    detector, landmarks = dlib_landmarks(folder)
    recognizer = dlib_recognizer(folder)

    def find(pixels: Pixels) -> list[Face]:
        image, scale, boxes = look(detector, pixels)
        faces = []
        for box in boxes:
            numbers = np.array(recognizer.compute_face_descriptor(image, landmarks(image, box)))
            faces.append(Face(box.left() / scale, box.top() / scale, box.width() / scale, numbers))
        return sorted(faces, key=lambda face: -face.side)

    return find


def look(detector: Any, pixels: Pixels) -> tuple[Any, float, Any]:
    """Return the picture as it was looked at, its scale, and dlib's boxes in it."""
    longer = max(pixels.shape[:2])
    for most in LONGER_SIDES:
        scale = float(np.clip(longer, LEAST, most)) / longer
        image = to_uint8(resized(pixels, scale))
        boxes = detector(image, 0)
        if boxes or longer <= most:
            break
    small = longer <= LONGER_SIDES[0]
    return image, scale, boxes or (detector(image, 1) if small else boxes)


def resized(pixels: Pixels, scale: float) -> Pixels:
    """Resize (H, W, 3) by a factor."""
    if scale == 1:
        return pixels
    height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
    return from_tensor(resize_bicubic(to_tensor(pixels), (height, width), antialias=scale < 1))
