"""Loaders of the metrics that need no learned perceptual network: pixels, dlib's faces, ArcFace recognizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.evaluation.niqe import niqe, read_natural_model
from pfstorer_rt.evaluation.sample import Measure, MetricFiles, Sample
from pfstorer_rt.extras import needed_by
from pfstorer_rt.faces import dlib, finding
from pfstorer_rt.faces.arcface import aligned_embedder, arcface_embedder, find_five_points
from pfstorer_rt.faces.dlib import INSTALL_METRICS, SAME_PERSON, Embedding
from pfstorer_rt.faces.landmarks import landmark_network
from pfstorer_rt.imaging import similarity
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.imaging.similarity import SSIM_WINDOW

RANGES = {"-1..1": (2.0, -1.0), "0..1": (1.0, 0.0), "0..255": (255.0, 0.0)}
"""Range of a network's input -> factor and offset that map [0, 1] to it."""


def known_faces(references: Sequence[Sample], embed: Callable[[Pixels], Embedding | None]) -> list[Embedding]:
    """Return the embeddings of the references that show a face."""
    return [face for reference in references if (face := reference.once(embed)) is not None]


def load_psnr(_: MetricFiles) -> Measure:
    """Load PSNR in dB."""
    return lambda result, original, _: similarity.psnr(result.pixels, original.pixels)


def load_ssim(_: MetricFiles) -> Measure:
    """Load SSIM; None for images smaller than its window of 11 pixels."""
    with needed_by("SSIM"):
        import skimage.metrics  # noqa: F401

    def measure(result: Sample, original: Sample, _: Sequence[Sample]) -> float | None:
        fits = min(original.pixels.shape[:2]) >= SSIM_WINDOW
        return similarity.ssim(result.pixels, original.pixels) if fits else None

    return measure


def dlib_embedder() -> Callable[[Pixels], Embedding | None]:
    """Return dlib's embedding function; raises `MissingBackendError` without the `metrics` extra."""
    embed = finding.face_embedder()
    if embed is None:
        raise MissingBackendError(f"dlib and its weights are not installed; {INSTALL_METRICS}")
    return embed


def load_id(_: MetricFiles) -> Measure:
    """Load the mean distance between dlib's embeddings of the result and of the references."""
    embed = dlib_embedder()
    return lambda result, _, references: dlib.mean_distance(result.once(embed), known_faces(references, embed))


def load_id_original(_: MetricFiles) -> Measure:
    """Load the distance between dlib's embeddings of the result and of the original."""
    embed = dlib_embedder()
    return lambda result, original, _: dlib.identity_distance(result.once(embed), original.once(embed))


def load_verification(_: MetricFiles) -> Measure:
    """Load verification: 1.0 if the result is accepted as the references' person, else 0.0 (also without a face)."""
    embed = dlib_embedder()

    def measure(result: Sample, _: Sample, references: Sequence[Sample]) -> float | None:
        known = known_faces(references, embed)
        if not known:
            return None
        distance = dlib.mean_distance(result.once(embed), known)
        return float(distance is not None and distance < SAME_PERSON)

    return measure


def load_lmse(_: MetricFiles) -> Measure:
    """Load the squared error of dlib's landmarks; both images use the box of the original's face."""
    dlib.load_dlib()

    def measure(result: Sample, original: Sample, _: Sequence[Sample]) -> float | None:
        box = original.once(finding.find_largest)
        if box is None:
            return None
        truth = finding.landmarks_at_side(original.pixels, box)
        return dlib.landmark_error(finding.landmarks_at_side(result.pixels, box), truth)

    return measure


def load_sharpness(_: MetricFiles) -> Measure:
    """Load the mean gradient of the result divided by the original's; None for an original without any gradient."""

    def measure(result: Sample, original: Sample, _: Sequence[Sample]) -> float | None:
        truth = original.once(similarity.mean_gradient)
        return similarity.mean_gradient(result.pixels) / truth if truth else None

    return measure


def load_niqe(files: MetricFiles) -> Measure:
    """Load NIQE, which does not use the original; None for a side under 192 pixels."""
    if files.niqe is None:
        raise MissingBackendError("give the parameters of NIQE as a file", setting="niqe")
    with needed_by("NIQE"):
        import scipy  # noqa: F401
    model = read_natural_model(files.niqe)
    return lambda result, original, references: niqe(result.pixels, model)


def load_landmarks(files: MetricFiles) -> Measure:
    """Load the squared error of 98 landmarks; both images use the face of the original."""
    if files.landmarks is None:
        raise MissingBackendError("give a network of 98 landmarks as an ONNX file", setting="landmarks")
    dlib.load_dlib()
    find = landmark_network(files.landmarks)

    def measure(result: Sample, original: Sample, _: Sequence[Sample]) -> float | None:
        box = original.once(finding.find_largest)
        if box is None:
            return None
        face = finding.landmarks_at_side(original.pixels, box)
        points = (find(finding.at_landmark_side(image.pixels), face) for image in (result, original))
        return dlib.landmark_error(*points)

    return measure


def recognizer_file(files: MetricFiles) -> tuple[Path, tuple[float, float]]:
    """Return the file of the recognizer and the scaling of its input; raises `MissingBackendError` without a file."""
    if files.arcface is None:
        raise MissingBackendError("give a recognizer of the ArcFace family as an ONNX file", setting="arcface")
    return files.arcface, RANGES[files.arcface_range]


def load_arcface(files: MetricFiles) -> Measure:
    """Load 100 x the mean cosine similarity between the embeddings of result and references; None without a face."""
    embed = arcface_embedder(*recognizer_file(files))

    def measure(result: Sample, _: Sample, references: Sequence[Sample]) -> float | None:
        face, known = result.once(embed), known_faces(references, embed)
        return None if face is None or not known else 100 * float(np.mean([face @ other for other in known]))

    return measure


def load_arcface_original(files: MetricFiles) -> Measure:
    """Load 100 x the cosine similarity between the embeddings of result and original; both use the original's face."""
    embed = aligned_embedder(*recognizer_file(files))
    dlib.load_dlib()

    def measure(result: Sample, original: Sample, _: Sequence[Sample]) -> float | None:
        points = original.once(find_five_points)
        return None if points is None else 100 * float(embed(result.pixels, points) @ embed(original.pixels, points))

    return measure
