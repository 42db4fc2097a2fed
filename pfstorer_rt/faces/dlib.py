"""dlib's networks for faces: detector, 68 landmarks and an embedding of 128 numbers (extra `metrics`)."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.extras import install
from pfstorer_rt.imaging.rows import Pixels

Embedding = npt.NDArray[np.float64]
Points = npt.NDArray[np.float64]
RECOGNIZER = "dlib_face_recognition_resnet_model_v1.dat"
"""File of dlib's network that maps a face to 128 numbers."""
SAME_PERSON = 0.6
"""dlib's threshold: two embeddings at a smaller distance count as the same person."""
INSTALL_METRICS = install("metrics")
Network = Callable[..., Any]
_LOADING = threading.Lock()


def face_models() -> Path | None:
    """Return the folder of dlib's weights, or None when the `metrics` extra is not installed."""
    if importlib.util.find_spec("_dlib_pybind11") is None and importlib.util.find_spec("dlib") is None:
        return None
    # The package is not imported, because its __init__ needs pkg_resources, which new setuptools lacks.
    spec = importlib.util.find_spec("face_recognition_models")
    return Path(spec.origin).parent / "models" if spec and spec.origin else None


def load_dlib() -> tuple[Network, Network, Network]:
    """Return dlib's networks; each is read at its first call, and does one call at a time.

    The networks are the face detector (image uint8 (H, W, 3), number of doublings), the predictor of 68 landmarks
    (image, rectangle) and the recognizer (image, landmarks, or a crop of 150 x 150 pixels).
    Raises `MissingBackendError` when the `metrics` extra is not installed.
    """
    folder = face_models()
    if folder is None:
        raise MissingBackendError(f"dlib and its weights are not installed; {INSTALL_METRICS}")
    with _LOADING:
        return _read_dlib(folder)


@lru_cache(maxsize=1)
def _read_dlib(folder: Path) -> tuple[Network, Network, Network]:
    import dlib

    def predictor() -> Network:
        return cast(Network, dlib.shape_predictor(str(folder / "shape_predictor_68_face_landmarks.dat")))

    def recognizer() -> Network:
        return cast(Network, dlib.face_recognition_model_v1(str(folder / RECOGNIZER)).compute_face_descriptor)

    return _one_at_a_time(dlib.get_frontal_face_detector), _one_at_a_time(predictor), _one_at_a_time(recognizer)


def _one_at_a_time(load: Callable[[], Network]) -> Network:
    """Return a function that loads a network at its first call, and calls it from one thread at a time.

    The landmarks need 100 MB, and finding faces needs only the detector. The calls write to the network's memory.
    """
    lock, loaded = threading.Lock(), list[Network]()

    def call(*arguments: Any) -> Any:
        with lock:
            if not loaded:
                loaded.append(load())
            return loaded[0](*arguments)

    return call


def landmark_error(points: Points, truth: Points) -> float:
    """Return the mean squared distance of landmarks in pixels²; both (N, 2)."""
    return float(np.mean(np.sum((points - truth) ** 2, axis=1)))


def to_uint8(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Clamp (H, W, 3) to [0, 1] and round it to bytes."""
    return np.ascontiguousarray(np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8))


def identity_distance(a: Embedding | None, b: Embedding | None) -> float | None:
    """Return the Euclidean distance of two embeddings; None when either image shows no face."""
    return None if a is None or b is None else float(np.linalg.norm(a - b))


def mean_distance(face: Embedding | None, known: Sequence[Embedding]) -> float | None:
    """Return the mean distance of an embedding to known embeddings; None without a face or known embeddings."""
    return None if face is None or not known else float(np.mean([np.linalg.norm(face - other) for other in known]))
