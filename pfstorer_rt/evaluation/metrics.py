"""Metrics of a restored picture: PSNR, SSIM (scikit-image) and face identity (dlib, extra `metrics`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.float32]
Embedding = npt.NDArray[np.float64]
SAME_PERSON = 0.6
"""dlib's own threshold: two faces nearer than this are accepted as one person."""
INSTALL_METRICS = "pip install 'pfstorer-rt[metrics]'"


def psnr(output: Pixels, target: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two (H, W, 3) pictures in [0, 1]; infinite when equal."""
    error = float(np.mean((output.astype(np.float64) - target.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(output: Pixels, target: Pixels) -> float:
    """Structural similarity of two (H, W, 3) pictures in [0, 1] (Wang 2004: gaussian window, sigma 1.5)."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            output, target, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
    )  # fmt: skip


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
    import dlib

    detector = dlib.get_frontal_face_detector()
    landmarks = dlib.shape_predictor(str(folder / "shape_predictor_68_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))

    def embed(pixels: Pixels) -> Embedding | None:
        image = np.ascontiguousarray(np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8))
        faces = detector(image, 1) or detector(image, 2)
        if not faces:
            return None
        face = max(faces, key=lambda box: box.area())
        return np.array(network.compute_face_descriptor(image, landmarks(image, face)), dtype=np.float64)

    return embed


def identity_distance(a: Embedding | None, b: Embedding | None) -> float | None:
    """Euclidean distance of two embeddings; None when either picture shows no face."""
    return None if a is None or b is None else float(np.linalg.norm(a - b))
