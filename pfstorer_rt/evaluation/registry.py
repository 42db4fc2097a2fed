"""The registry of metrics: meaning, requirements and loader of each. To add a metric, add an entry to `METRICS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import numpy as np

from pfstorer_rt.errors import MissingBackendError, SettingError
from pfstorer_rt.evaluation import loaders, perceptual
from pfstorer_rt.evaluation.sample import Load, Measure, MetricFiles, Sample
from pfstorer_rt.faces.dlib import SAME_PERSON
from pfstorer_rt.files import sha256_file
from pfstorer_rt.imaging.rows import Pixels

__all__ = ["METRICS", "Measure", "Metric", "MetricFiles", "Metrics", "Sample", "load_metrics"]


@dataclass(frozen=True)
class Metric:
    """One column of a report."""

    key: str
    """Name in CSV and JSON."""
    title: str
    better: Literal["up", "down"]
    unit: str
    meaning: str
    licence: str
    """Licence of the code and of the weights."""
    packages: tuple[str, ...]
    """Distributions whose versions a report lists."""
    load: Load
    counts_failures: bool = False
    """Count a missing result as a black image, so that failures do not improve a method's mean."""
    files: tuple[str, ...] = ()
    """Fields of `MetricFiles` with the metric's weight files."""
    digits: int = 3


@dataclass(frozen=True)
class Metrics:
    """Loaded metrics; a metric that could not be loaded stays in `columns`, with the reason in `refused`."""

    columns: tuple[Metric, ...]
    measures: dict[str, Measure]
    refused: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def measure(self, result: Sample, original: Sample, references: Sequence[Sample] = ()) -> dict[str, float | None]:
        """Measure one image with every metric.

        result, original: of the same size. references: photographs of the person, of any size; pass the same `Sample`
        objects for every image, so that their faces are found once.
        Returns key -> value; None when a metric could not be loaded or is not defined for these images (no face, too
        small). `verification_dlib` is 1.0 or 0.0. Raises `ValueError` when the sizes differ.
        """
        if result.pixels.shape != original.pixels.shape:
            raise SettingError(
                f"the result is {size(result.pixels)}, its original {size(original.pixels)}; restore at scale 1"
            )
        return {
            column.key: self.measures[column.key](result, original, references) if column.key in self.measures else None
            for column in self.columns
        }

    def of_failure(self, original: Sample, references: Sequence[Sample] = ()) -> dict[str, float | None]:
        """Return the values of a missing result: None except for metrics that count failures."""
        black = Sample(np.zeros_like(original.pixels))
        counted = {column.key for column in self.columns if column.counts_failures} & set(self.measures)
        return {
            column.key: self.measures[column.key](black, original, references) if column.key in counted else None
            for column in self.columns
        }


def load_metrics(keys: Sequence[str] | None = None, files: MetricFiles | None = None) -> Metrics:
    """Load metrics by their keys in `METRICS`, or all of them; a metric that cannot be loaded does not stop the others.

    Raises `ValueError` for an unknown key, `BadFileError` for a weight file that cannot be read.
    """
    known = {metric.key: metric for metric in METRICS}
    unknown = sorted(set(keys or ()) - set(known))
    if unknown:
        raise SettingError(
            f"unknown metric {', '.join(unknown)}; expected names from this list: {', '.join(known)}", setting="metrics"
        )
    columns = tuple(metric for metric in METRICS if keys is None or metric.key in keys)
    loaded = Metrics(columns, {})
    for metric in columns:
        loaded.versions[metric.key] = describe_version(metric, files or MetricFiles())
        try:
            loaded.measures[metric.key] = metric.load(files or MetricFiles())
        except MissingBackendError as error:
            loaded.refused[metric.key] = f"not measured: {error}"
    return loaded


def describe_version(metric: Metric, files: MetricFiles) -> str:
    """Return the versions of a metric's packages, the digest of its weight file, and the range of its input."""
    words = [f"{name} {package_version(name)}" for name in metric.packages]
    paths = [path for name in metric.files if (path := getattr(files, name)) is not None]
    words += [f"{path.name} sha256 {sha256_file(path)[:12]}" for path in paths]
    return ", ".join([*words, *([f"input {files.arcface_range}"] if "arcface" in metric.files else [])])


def package_version(name: str) -> str:
    """Return the version of a distribution, or `not installed`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def size(pixels: Pixels) -> str:
    """Return WIDTHxHEIGHT."""
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


DLIB = ("dlib-bin", "face_recognition_models")
DLIB_LICENCE = "BSL-1.0 (dlib), weights CC0"

METRICS: tuple[Metric, ...] = (
    Metric(
        key="psnr",
        title="PSNR",
        better="up",
        unit="dB",
        meaning="peak signal-to-noise ratio over all pixels and channels",
        licence="Apache-2.0",
        packages=("pfstorer-rt",),
        load=loaders.load_psnr,
        digits=2,
    ),
    Metric(
        key="ssim",
        title="SSIM",
        better="up",
        unit="",
        meaning="structural similarity, gaussian window, mean of the three channels",
        licence="BSD-3-Clause",
        packages=("scikit-image",),
        load=loaders.load_ssim,
    ),
    Metric(
        key="lpips",
        title="LPIPS",
        better="down",
        unit="",
        meaning="learned perceptual distance, version 0.1 (Zhang 2018), AlexNet",
        licence="BSD-2-Clause (lpips), weights BSD-3-Clause (torchvision)",
        packages=("lpips",),
        load=perceptual.load_lpips,
        files=("alexnet", "lpips"),
    ),
    Metric(
        key="stlpips",
        title="ST-LPIPS",
        better="down",
        unit="",
        meaning="shift-tolerant LPIPS (Ghildyal and Liu 2022), AlexNet; not LPIPS",
        licence="BSD-2-Clause (weights in stlpips_pytorch)",
        packages=("stlpips_pytorch",),
        load=perceptual.load_stlpips,
    ),
    Metric(
        key="musiq",
        title="MUSIQ",
        better="up",
        unit="",
        meaning="quality without reference (Ke 2021), KonIQ-10k weights",
        licence="PolyForm-Noncommercial-1.0.0 (pyiqa), weights Apache-2.0",
        packages=("pyiqa",),
        load=perceptual.load_musiq,
        files=("musiq",),
        digits=1,
    ),
    Metric(
        key="niqe",
        title="NIQE",
        better="down",
        unit="",
        meaning="quality without reference (Mittal 2013): distance to the statistics of undegraded photographs",
        licence="Apache-2.0, parameters: licence of the file",
        packages=("scipy",),
        load=loaders.load_niqe,
        files=("niqe",),
        digits=2,
    ),
    Metric(
        key="sharpness",
        title="Sharpness",
        better="up",
        unit="",
        meaning="mean gradient divided by the original's: 1 is as sharp, less is blurred, more is noise or strands",
        licence="Apache-2.0",
        packages=("pfstorer-rt",),
        load=loaders.load_sharpness,
        digits=2,
    ),
    Metric(
        key="lmse_98",
        title="LMSE (98)",
        better="down",
        unit="px²",
        meaning=(
            "mean squared distance of 98 landmarks of the given network to the original's, at a longer side of 512 px; "
            "the paper uses FaRL's landmarks"
        ),
        licence="MIT (onnxruntime), weights: licence of the file",
        packages=("onnxruntime",),
        load=loaders.load_landmarks,
        files=("landmarks",),
        digits=1,
    ),
    Metric(
        key="lmse_dlib",
        title="LMSE (dlib)",
        better="down",
        unit="px²",
        meaning=(
            "mean squared distance of dlib's 68 landmarks to the original's, at a longer side of 512 px; "
            "the paper uses FaRL's landmarks"
        ),
        licence="BSL-1.0 (dlib), landmark weights for non-commercial use (iBUG 300-W)",
        packages=DLIB,
        load=loaders.load_lmse,
        digits=1,
    ),
    Metric(
        key="id_dlib",
        title="ID (dlib)",
        better="down",
        unit="",
        meaning="mean Euclidean distance between dlib's embeddings of result and references",
        licence=DLIB_LICENCE,
        packages=DLIB,
        load=loaders.load_id,
    ),
    Metric(
        key="id_original_dlib",
        title="ID to original (dlib)",
        better="down",
        unit="",
        meaning="Euclidean distance between dlib's embeddings of result and original",
        licence=DLIB_LICENCE,
        packages=DLIB,
        load=loaders.load_id_original,
    ),
    Metric(
        key="verification_dlib",
        title="Verified (dlib)",
        better="up",
        unit="%",
        meaning=(
            f"share of results with an ID (dlib) below {SAME_PERSON}, dlib's threshold; a result without a face is not "
            "verified"
        ),
        licence=DLIB_LICENCE,
        packages=DLIB,
        load=loaders.load_verification,
        counts_failures=True,
        digits=1,
    ),
    Metric(
        key="id_arcface",
        title="ID (ArcFace)",
        better="up",
        unit="",
        meaning="100 x mean cosine similarity between the given recognizer's embeddings of result and references",
        licence="MIT (onnxruntime), weights: licence of the file",
        packages=("onnxruntime",),
        load=loaders.load_arcface,
        files=("arcface",),
        digits=1,
    ),
    Metric(
        key="id_original_arcface",
        title="ID to original (ArcFace)",
        better="up",
        unit="",
        meaning=(
            "100 x cosine similarity between the given recognizer's embeddings of result and original, "
            "both aligned by the original's face"
        ),
        licence="MIT (onnxruntime), weights: licence of the file",
        packages=("onnxruntime",),
        load=loaders.load_arcface_original,
        files=("arcface",),
        digits=1,
    ),
)
"""All metrics, in the order of a report's columns."""
