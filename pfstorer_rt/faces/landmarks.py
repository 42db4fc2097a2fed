"""Landmarks of a face by a network in an ONNX file, such as PFLD (Guo 2019)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pfstorer_rt.errors import BadFileError, one_line
from pfstorer_rt.faces.dlib import Points
from pfstorer_rt.imaging.rows import Pixels

SIDE = 112
MARGIN = 1.05
"""Side of the square that the network sees, divided by the extent of the face."""
COUNT = 98


def landmark_network(path: Path) -> Callable[[Pixels, Points], Points]:
    """Return a function of an image (H, W, 3) in [0, 1] and any landmarks of its face (N, 2) -> 98 landmarks (98, 2).

    All landmarks are (x, y) in pixels of the image. The square around the given landmarks is what the network sees.
    Raises `BadFileError` unless the file maps (1, 3, 112, 112) to 98 points.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        count = np.size(session.run(None, {name: np.zeros((1, 3, SIDE, SIDE), np.float32)})[0])
    except Exception as error:  # onnxruntime's errors have no common base class
        reason = one_line(error)
        raise BadFileError(f"{path}: no network with input (1, 3, {SIDE}, {SIDE}) float32 ({reason})") from error
    if count != 2 * COUNT:
        raise BadFileError(f"{path}: its output has {count} numbers; expected {COUNT} points (x, y)")

    def find(pixels: Pixels, face: Points) -> Points:
        corner, side = square(face)
        planes = crop(pixels, corner, side).transpose(2, 0, 1)[None] * 2 - 1
        found = np.asarray(session.run(None, {name: planes.astype(np.float32)})[0], np.float64).reshape(COUNT, 2)
        return found * side + corner

    return find


def square(face: Points) -> tuple[Points, float]:
    """Return the corner (x, y) and the side of the square around landmarks (N, 2)."""
    low, high = face.min(0), face.max(0)
    side = float((high - low).max()) * MARGIN
    return (low + high) / 2 - side / 2, side


def crop(pixels: Pixels, corner: Points, side: float) -> Pixels:
    """Crop and resize a square of (H, W, 3) to (112, 112, 3); outside the image, its edge is repeated."""
    from skimage.transform import AffineTransform, warp

    place = AffineTransform(scale=side / SIDE, translation=corner)
    return np.asarray(warp(pixels, place, output_shape=(SIDE, SIDE), order=1, mode="edge"), np.float32)
