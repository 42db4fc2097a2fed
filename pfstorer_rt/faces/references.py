"""Identity distances between a result and reference photographs of the person (extra `metrics`).

The caller passes the references each time. A plan contains no embeddings, because embeddings are biometric data and
plans are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.faces.dlib import INSTALL_METRICS, Embedding, identity_distance
from pfstorer_rt.faces.finding import face_embedder
from pfstorer_rt.imaging.files import load_image
from pfstorer_rt.imaging.find import list_images
from pfstorer_rt.imaging.rows import Pixels, Rows, read_pixels

LARGEST = 16_000_000
"""Largest number of pixels in which faces are searched; a larger image is subsampled first."""


class References:
    """Embeddings of reference photographs, kept only in memory."""

    def __init__(self, folder: str | Path, embed: Callable[[Pixels], Embedding | None] | None = None) -> None:
        """Raise `MissingBackendError` without the `metrics` extra, `BadFileError` when no reference shows a face.

        embed: returns the embedding of the largest face, or None without a face; None selects dlib's network.
        `notes` has a line for each file that could not be read.
        """
        embed = embed or face_embedder()
        if embed is None:
            raise MissingBackendError(f"comparing with references needs the metrics extra: {INSTALL_METRICS}")
        self._embed: Callable[[Pixels], Embedding | None] = embed
        files = list_images(Path(folder), recursive=False)  # sub-folders may hold other people
        self.faces: list[Embedding] = []
        self.notes: list[str] = []
        for file in files:
            try:
                face = embed(load_image(file).pixels)
            except BadFileError as error:
                self.notes.append(f"reference skipped: {error}")
                continue
            self.faces += [] if face is None else [face]
        if not self.faces:
            raise BadFileError(f"{folder}: no face found in {len(files)} images; expected photographs of the person")

    def distance(self, rows: Rows) -> float | None:
        """Return the mean distance between an image's largest face and the references; None without a face."""
        thin = 1 + int((rows.height * rows.width / LARGEST) ** 0.5) if rows.height * rows.width > LARGEST else 1
        face = self._embed(_thinned(rows, thin))
        distances = [d for known in self.faces if (d := identity_distance(face, known)) is not None]
        return sum(distances) / len(distances) if distances else None

    def facts(self, source: Rows, result: Rows) -> dict[str, Any]:
        """Return entries of a report, with a note when the result is farther from the references than the input is."""
        before, after = self.distance(source), self.distance(result)
        if after is None:
            return {"id_distance": None, "id_distance_input": _round(before), "notes": ["no face found in the result"]}
        facts: dict[str, Any] = {"id_distance": _round(after), "id_distance_input": _round(before)}
        if before is not None and after > before:
            facts["notes"] = [
                f"farther from the references than the input: {after:.3f}, the input has {before:.3f}; try another "
                "strength, number of steps or seed"
            ]
        return facts


def _round(distance: float | None) -> float | None:
    return None if distance is None else round(distance, 4)


def _thinned(rows: Rows, step: int) -> Pixels:
    import numpy as np

    return (
        np.concatenate([read_pixels(rows, y, y + 1)[:, ::step] for y in range(0, rows.height, step)])
        if step > 1
        else read_pixels(rows, 0, rows.height)
    )
