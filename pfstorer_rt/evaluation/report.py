"""Evaluate a folder of restored pictures against the originals and the person's references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.evaluation.metrics import (
    INSTALL_METRICS,
    SAME_PERSON,
    Embedding,
    Pixels,
    face_embedder,
    identity_distance,
    psnr,
    ssim,
)  # fmt: skip
from pfstorer_rt.image import IMAGE_SUFFIXES, load_image


@dataclass(frozen=True)
class Row:
    """Figures of one picture; None where a metric could not be computed."""

    name: str
    psnr: float
    ssim: float
    id_distance: float | None
    """Mean Euclidean distance of dlib's embedding to those of the references."""
    same_person: bool | None


@dataclass(frozen=True)
class Report:
    """Figures of all pictures, and what could not be measured."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        """Return means over the pictures that a metric has a figure for; `verification` is a share in 0..1."""

        def mean(values: Sequence[float | None]) -> float | None:
            known = [v for v in values if v is not None]
            return fmean(known) if known else None

        return {
            "images": len(self.rows), "psnr": mean([r.psnr for r in self.rows]),
            "ssim": mean([r.ssim for r in self.rows]), "id_distance": mean([r.id_distance for r in self.rows]),
            "verification": mean([None if r.same_person is None else float(r.same_person) for r in self.rows]),
        }  # fmt: skip


def evaluate(refs: Path, hq: Path, outputs: Path) -> Report:
    """Measure every picture in `outputs` that has an original of the same name in `hq`.

    refs: photographs of the person. The result of `a.jpg` may be named `a.*` or `a_restored.*`; another
    size than the original's is an error, not resized away.
    Raises `BadFileError` when a folder is missing or empty or an original has no result.
    """
    originals, results = pictures(hq), pictures(outputs)
    by_stem = {path.stem.removesuffix("_restored"): path for path in results}
    missing = [p.name for p in originals if p.stem not in by_stem]
    if missing:
        raise BadFileError(f"{outputs}: no result for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    embed = face_embedder()
    notes = [] if embed else [f"identity was not measured: {INSTALL_METRICS}"]
    known: list[Embedding] = []
    if embed:
        found = [embed(load_image(path).pixels) for path in pictures(refs)]
        known = [e for e in found if e is not None]
        if not known:
            notes.append("identity was not measured: no face was found in the references")
    rows = []
    for path in originals:
        original, result = load_image(path).pixels, load_image(by_stem[path.stem]).pixels
        if original.shape != result.shape:
            raise BadFileError(
                f"{by_stem[path.stem]}: {result.shape[1]}x{result.shape[0]}, its original is "
                f"{original.shape[1]}x{original.shape[0]}; restore at --scale 1"
            )
        distance = mean_distance(embed(result), known) if embed and known else None
        same = None if distance is None else distance < SAME_PERSON
        if embed and known and distance is None:
            notes.append(f"{path.name}: no face was found in the result; it counts as not the same person")
            same = False
        rows.append(Row(path.stem, psnr(result, original), structural(result, original), distance, same))
    return Report(rows, notes)


def mean_distance(face: Embedding | None, known: Sequence[Embedding]) -> float | None:
    """Mean distance of an embedding to several; None without a face."""
    distances = [identity_distance(face, other) for other in known]
    return None if face is None else float(np.mean([d for d in distances if d is not None]))


def structural(result: Pixels, original: Pixels) -> float:
    """SSIM, or NaN for a picture smaller than its window of 11 pixels."""
    return ssim(result, original) if min(original.shape[:2]) >= 11 else float("nan")


def pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder, sorted; raises `BadFileError` when there are none."""
    if not folder.is_dir():
        raise BadFileError(f"{folder}: no such folder")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise BadFileError(f"{folder}: no pictures; expected {' '.join(IMAGE_SUFFIXES)}")
    return found
