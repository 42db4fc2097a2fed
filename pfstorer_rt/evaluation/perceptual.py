"""Learned metrics: LPIPS, ST-LPIPS and MUSIQ, with the published weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pfstorer_rt.errors import MissingBackendError, one_line
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

    Without `files.alexnet`, torchvision provides the backbone.
    Raises `MissingBackendError` when the package or the backbone is missing, `BadFileError` for another file.
    """
    advice = "install it without its dependencies, and give the AlexNet weights unless torchvision loads"
    linear = package_file("lpips", "weights/v0.1/alex.pth", advice)
    backbone = torchvision_alexnet() if files.alexnet is None else read_weights(files.alexnet)
    slices = alexnet_slices(backbone, files.alexnet or Path("alexnet"))
    return measure_by(PerceptualDistance(slices, linear_weights(read_weights(linear))))


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
