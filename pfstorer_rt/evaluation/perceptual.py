"""Learned metrics: LPIPS, ST-LPIPS and MUSIQ, with the published weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pfstorer_rt.errors import BadFileError, MissingBackendError, one_line
from pfstorer_rt.evaluation.sample import Measure, MetricFiles, Sample
from pfstorer_rt.imaging.perceptual import (
    SMALLEST,
    PerceptualDistance,
    alexnet_slices,
    linear_weights,
    package_file,
    read_weights,
    shift_tolerant_distance,
    to_planes,
    torchvision_alexnet,
)
from pfstorer_rt.imaging.rows import Pixels


def load_lpips(files: MetricFiles) -> Measure:
    """Load LPIPS 0.1 with AlexNet (Zhang 2018, eq. 1): the linear weights come from the package `lpips`.

    Without `files.alexnet`, torchvision provides the backbone. `files.lpips` is used instead of both.
    Raises `MissingBackendError` when the package or the backbone is missing, `BadFileError` for another file.
    """
    if files.lpips is not None:
        return measure_by_file(files.lpips)
    advice = (
        "install it without its dependencies, and give the AlexNet weights unless torchvision loads; or give LPIPS as "
        "an ONNX file"
    )
    linear = package_file("lpips", "weights/v0.1/alex.pth", advice)
    backbone = torchvision_alexnet() if files.alexnet is None else read_weights(files.alexnet)
    slices = alexnet_slices(backbone, files.alexnet or Path("alexnet"))
    return measure_by(PerceptualDistance(slices, linear_weights(read_weights(linear))))


def measure_by_file(path: Path) -> Measure:
    """Return LPIPS by an ONNX file; None for images with a side under 32 pixels; raises `BadFileError`."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        probe = np.zeros((1, 3, 2 * SMALLEST, 2 * SMALLEST), np.float32)
        count = np.size(session.run(None, dict.fromkeys(names, probe))[0])
    except Exception as error:  # onnxruntime's errors have no common base class
        reason = one_line(error)
        raise BadFileError(f"{path}: no network of two images (1, 3, H, W) float32 ({reason})") from error
    if len(names) != 2 or count != 1:
        raise BadFileError(f"{path}: {len(names)} inputs and {count} values; expected two images and one distance")

    def measure(result: Sample, original: Sample, _: Sequence[Sample]) -> float | None:
        if min(original.pixels.shape[:2]) < SMALLEST:
            return None
        planes = (to_planes(image.pixels).numpy() for image in (result, original))
        return float(np.ravel(session.run(None, dict(zip(names, planes, strict=True)))[0])[0])

    return measure


def load_stlpips(_: MetricFiles) -> Measure:
    """Load shift-tolerant LPIPS; raises `MissingBackendError` when its package is missing."""
    return measure_by(shift_tolerant_distance())


def load_musiq(files: MetricFiles) -> Measure:
    """Load MUSIQ of `pyiqa` with KonIQ-10k weights, 0 to 100; it does not use the original.

    Raises `MissingBackendError` when pyiqa cannot be imported or its weights are not available.
    """
    advice = "pip install pyiqa, with a torchvision of the same build as torch"
    try:
        import pyiqa
    except Exception as error:  # an incompatible torchvision raises many error types
        raise MissingBackendError(f"{advice} ({one_line(error)})") from error
    options = {"pretrained_model_path": str(files.musiq)} if files.musiq else {}
    try:
        network = pyiqa.create_metric("musiq", device="cpu", **options)
    except Exception as error:  # a failed download also raises many error types
        raise MissingBackendError(
            f"MUSIQ's weights did not load; give the file of its weights ({one_line(error)})", setting="musiq"
        ) from error

    def quality(pixels: Pixels) -> float:
        return float(network((to_planes(pixels) + 1) / 2))

    return lambda result, original, references: result.once(quality)


def measure_by(distance: PerceptualDistance) -> Measure:
    """Return a metric of a result and its original; None for images with a side under 32 pixels."""

    def features(pixels: Pixels) -> list[torch.Tensor]:
        return distance.features(to_planes(pixels))

    def measure(result: Sample, original: Sample, _: Sequence[Sample]) -> float | None:
        if min(original.pixels.shape[:2]) < SMALLEST:
            return None
        with torch.no_grad():
            return float(distance.between(features(result.pixels), original.once(features)))

    return measure
