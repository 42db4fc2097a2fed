"""Identity embeddings from a recognizer of the ArcFace family, an ONNX file (Deng 2019)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfstorer_rt.errors import BadFileError, SettingError, one_line
from pfstorer_rt.faces.dlib import Embedding, Points, load_dlib
from pfstorer_rt.faces.finding import at_landmark_side, find_largest, landmarks_at_side
from pfstorer_rt.imaging.rows import Pixels

SIDE = 112
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
"""Positions of both eyes, the nose and the corners of the mouth, (x, y) in pixels of 112 x 112."""
ALIKE = 0.97
"""Largest cosine similarity of the embeddings of an image that is white on the left and one that is white below.
MobileFace V2, whose input ends at 255, has 0.65 with its own range, and 0.98 or more with the others."""


def arcface_embedder(path: Path, scaling: tuple[float, float] = (2.0, -1.0)) -> Callable[[Pixels], Embedding | None]:
    """Return a function image (H, W, 3) in [0, 1] -> embedding of length 1 of its largest face, None without a face.

    scaling: factor and offset that map [0, 1] to the range of the recognizer's input.
    Raises `MissingBackendError` when the `metrics` extra is not installed, `BadFileError` for another file.
    """
    load_dlib()
    embed_at = aligned_embedder(path, scaling)

    def embed(pixels: Pixels) -> Embedding | None:
        points = find_five_points(pixels)
        return None if points is None else embed_at(pixels, points)

    return embed


def aligned_embedder(path: Path, scaling: tuple[float, float] = (2.0, -1.0)) -> Callable[[Pixels, Points], Embedding]:
    """Return a function of an image (H, W, 3) in [0, 1] and points of `find_five_points` -> embedding of length 1.

    scaling: as in `arcface_embedder`. Raises `BadFileError` for another file, and `SettingError` for a scaling with
    which the recognizer distinguishes nothing.
    """
    session = open_recognizer(path)
    name = session.get_inputs()[0].name

    def embed_planes(planes: npt.NDArray[np.float64]) -> Embedding:
        inputs = {name: (planes * scaling[0] + scaling[1]).astype(np.float32)}
        vector = np.asarray(session.run(None, inputs)[0], dtype=np.float64).ravel()
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def embed(pixels: Pixels, points: Points) -> Embedding:
        return embed_planes(align(at_landmark_side(pixels), points).transpose(2, 0, 1)[None])

    check_embedder(embed_planes)
    return embed


def find_five_points(pixels: Pixels) -> Points | None:
    """Return the five points (5, 2) of the largest face, in pixels of `at_landmark_side(pixels)`; None without a face.

    Raises `MissingBackendError` when the `metrics` extra is not installed.
    """
    box = find_largest(pixels)
    return None if box is None else five_points(landmarks_at_side(pixels, box))


def open_recognizer(path: Path) -> Any:
    """Open the ONNX file; raises `BadFileError` unless it maps (1, 3, 112, 112) to one vector."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        probe = np.zeros((1, 3, SIDE, SIDE), np.float32)
        shape = np.shape(session.run(None, {session.get_inputs()[0].name: probe})[0])
    except Exception as error:  # onnxruntime's errors have no common base class
        reason = one_line(error)
        raise BadFileError(f"{path}: not a recognizer with input (1, 3, {SIDE}, {SIDE}) float32 ({reason})") from error
    if len(shape) != 2 or shape[1] < 2:
        raise BadFileError(f"{path}: its output has shape {shape}; expected one embedding, (1, N)")
    return session


def check_embedder(embed: Callable[[npt.NDArray[np.float64]], Embedding]) -> None:
    """Raise `SettingError` if two unlike images (1, 3, 112, 112) in [0, 1] have nearly the same embedding.

    A recognizer for values up to 255 finds every face equal to every other if the values end at 1.
    """
    left, bottom = np.zeros((2, 1, 3, SIDE, SIDE))
    left[..., : SIDE // 2] = bottom[:, :, SIDE // 2 :] = 1
    cosine = float(embed(left) @ embed(bottom))
    if cosine > ALIKE:
        raise SettingError(
            f"the recognizer gives two unlike images nearly the same embedding (cosine {cosine:.3f}); its input "
            "probably has another range of values",
            setting="arcface_range",
        )


def five_points(points: Points) -> Points:
    """Return both eyes, nose and corners of the mouth (5, 2) of dlib's 68 landmarks; image left comes first."""
    return np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])


def align(pixels: Pixels, points: Points) -> npt.NDArray[np.float64]:
    """Rotate, scale and shift (H, W, 3) in [0, 1] so that its five points match the template: (112, 112, 3)."""
    from skimage.transform import estimate_transform, warp

    transform = estimate_transform("similarity", points, TEMPLATE)
    return np.asarray(warp(pixels.astype(np.float64), transform.inverse, output_shape=(SIDE, SIDE), order=1))
