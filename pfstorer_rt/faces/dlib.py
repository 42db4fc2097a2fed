"""dlib's face detector, 68 landmarks and embedding of 128 numbers (extra `metrics`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pfstorer_rt.extras import install
from pfstorer_rt.imaging.rows import Pixels

Embedding = npt.NDArray[np.float64]
Points = npt.NDArray[np.float64]
RECOGNIZER = "dlib_face_recognition_resnet_model_v1.dat"
"""File of dlib's network from a face to 128 numbers."""
SAME_PERSON = 0.6
"""dlib's own threshold: two faces nearer than this are accepted as one person."""
INSTALL_METRICS = install("metrics")
LANDMARK_SIDE = 512
"""Longer side in pixels of the picture that landmarks are measured on; the paper's pictures have this size."""


def face_models() -> Path | None:
    """Return the folder of dlib's weights, or None when the `metrics` extra is not installed."""
    if importlib.util.find_spec("_dlib_pybind11") is None and importlib.util.find_spec("dlib") is None:
        return None
    # Found, not imported: its __init__ needs pkg_resources, which new setuptools no longer has.
    spec = importlib.util.find_spec("face_recognition_models")
    return Path(spec.origin).parent / "models" if spec and spec.origin else None


@lru_cache(maxsize=1)
def face_embedder() -> Callable[[Pixels], Embedding | None] | None:
    """Return a function picture (H, W, 3) in [0, 1] -> 128 numbers of its largest face, or None without a face.

    Returns None when the `metrics` extra is not installed. Small pictures are enlarged for the detector.
    """
    folder = face_models()
    if folder is None:
        return None
    detector, landmarks = dlib_landmarks(folder)
    network = dlib_recognizer(folder)

    def embed(pixels: Pixels) -> Embedding | None:
        image = to_uint8(pixels)
        face = largest(detector(image, 1) or detector(image, 2))
        if face is None:
            return None
        return np.array(network.compute_face_descriptor(image, landmarks(image, face)), dtype=np.float64)

    return embed


@lru_cache(maxsize=1)
def dlib_landmarks(folder: Path) -> tuple[Any, Any]:
    """Return dlib's face detector and its predictor of 68 landmarks, with the weights in `folder`."""
    import dlib

    predictor = dlib.shape_predictor(str(folder / "shape_predictor_68_face_landmarks.dat"))
    return dlib.get_frontal_face_detector(), predictor


@lru_cache(maxsize=1)
def dlib_recognizer(folder: Path) -> Any:
    """Return dlib's network from a face and its landmarks to 128 numbers, with the weights in `folder`."""
    import dlib

    return dlib.face_recognition_model_v1(str(folder / RECOGNIZER))


@dataclass(frozen=True)
class Landmarks:
    """dlib's 68 landmarks, measured on pictures resized to a longer side of `LANDMARK_SIDE`."""

    detector: Any
    predictor: Any

    def face(self, pixels: Pixels) -> Any | None:
        """Box of the largest face of (H, W, 3) in [0, 1], in the resized picture; None without a face."""
        return largest(self.detector(to_uint8(at_landmark_side(pixels)), 0))

    def points(self, pixels: Pixels, face: Any) -> Points:
        """Landmarks (68, 2) as (x, y) in pixels of the resized picture, of the face in a box of that picture."""
        shape = self.predictor(to_uint8(at_landmark_side(pixels)), face)
        return np.array([(point.x, point.y) for point in shape.parts()], dtype=np.float64)


def landmark_finder() -> Landmarks | None:
    """Return dlib's landmarks, or None when the `metrics` extra is not installed."""
    folder = face_models()
    return None if folder is None else Landmarks(*dlib_landmarks(folder))


def landmark_error(points: Points, truth: Points) -> float:
    """Mean over the landmarks of their squared distance in pixels²; both (N, 2)."""
    return float(np.mean(np.sum((points - truth) ** 2, axis=1)))


def at_landmark_side(pixels: Pixels) -> Pixels:
    """Resize (H, W, 3) so that its longer side has `LANDMARK_SIDE` pixels, aspect kept."""
    from skimage.transform import resize

    height, width = pixels.shape[:2]
    scale = LANDMARK_SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return np.asarray(resize(pixels, size, order=1, anti_aliasing=scale < 1), dtype=np.float32)


def to_uint8(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """(H, W, 3) in [0, 1], clamped and rounded to bytes."""
    return np.ascontiguousarray(np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8))


def largest(faces: Any) -> Any | None:
    """Return the box of the largest area, None of none."""
    return max(faces, key=lambda box: box.area()) if faces else None


def identity_distance(a: Embedding | None, b: Embedding | None) -> float | None:
    """Euclidean distance of two embeddings; None when either picture shows no face."""
    return None if a is None or b is None else float(np.linalg.norm(a - b))


def mean_distance(face: Embedding | None, known: Sequence[Embedding]) -> float | None:
    """Mean distance of an embedding to several; None without a face or without any to compare with."""
    return None if face is None or not known else float(np.mean([np.linalg.norm(face - other) for other in known]))
