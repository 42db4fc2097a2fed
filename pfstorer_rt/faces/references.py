"""Identity distances between a result and reference photographs of the person (extra `metrics`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.faces.dlib import INSTALL_METRICS, Embedding
from pfstorer_rt.faces.finding import Face, FindFaces, face_finder, find_turned, nearest_face, reduced
from pfstorer_rt.faces.likeness import OTHER_SETTINGS
from pfstorer_rt.files import show_path
from pfstorer_rt.imaging.files import load_image
from pfstorer_rt.imaging.find import list_images
from pfstorer_rt.imaging.rows import Rows

FARTHER = "farther from the references than the input"
NO_FACE = "no face found in the result"
"""Beginnings of the notes of `References.facts`."""
CHANGE = 0.02
"""A smaller increase of the distance gets no note: a shift of the face by a pixel has the same effect."""


class References:
    """Embeddings of one person's face, kept only in memory. `notes` has a line for each file without a face."""

    def __init__(self, faces: Sequence[Embedding], find: FindFaces | None = None, notes: Sequence[str] = ()) -> None:
        """Raise `MissingBackendError` without the `metrics` extra.

        faces: embeddings of photographs, or the mean embedding of an identity. find: None selects dlib's networks.
        """
        self._find, self.faces, self.notes = _finder(find), list(faces), list(notes)

    @classmethod
    def read(cls, folder: str | Path, find: FindFaces | None = None) -> References:
        """Measure the photographs of a folder, without its sub-folders; the person is the largest face of each.

        Raises `MissingBackendError` without the `metrics` extra, `BadFileError` when no photograph shows a face.
        """
        find = _finder(find)
        faces: list[Embedding] = []
        notes: list[str] = []
        files = list_images(Path(folder), recursive=False, note=notes.append)  # sub-folders may hold other people
        if not files:
            raise BadFileError(f"{folder}: no images directly in this folder; expected photographs of the person")
        for file in files:
            try:
                found = find_turned(find, load_image(file).pixels)[1]
            except BadFileError as error:
                notes.append(f"reference skipped: {error}")
                continue
            faces += [face.embedding for face in found[:1]]
            notes += [] if found else [f"reference skipped: {show_path(file)}: no face found"]
        if not faces:
            raise BadFileError(f"{folder}: no face found in {len(files)} images; expected photographs of the person")
        return cls(faces, find, notes)

    @property
    def mean(self) -> Embedding:
        """Return the mean embedding of the person."""
        return np.asarray(np.mean(self.faces, 0), np.float64)

    def distance(self, rows: Rows) -> float | None:
        """Return the mean distance between the person's face in an image and the references; None without a face.

        Among several faces, the person is the face most similar to the references.
        """
        return self._nearest(self._faces(rows))[0]

    def facts(self, source: Rows, result: Rows, advice: str = OTHER_SETTINGS) -> dict[str, Any]:
        """Return entries of a report, with a note when the result is farther from the references than the input is.

        advice: what the user can do then.
        The face of the result is the one at the place of the person's face in the input.
        """
        before, person = self._nearest(self._faces(source))
        faces = self._faces(result)
        after, _ = self._nearest([min(faces, key=lambda face: _apart(face, person))] if faces and person else faces)
        before, after = _round(before), _round(after)
        if after is None:
            return {"id_distance": None, "id_distance_input": before, "notes": [NO_FACE]}
        facts: dict[str, Any] = {"id_distance": after, "id_distance_input": before}
        if before is not None and after > before + CHANGE:
            facts["notes"] = [f"{FARTHER}: {after:.3f}, the input has {before:.3f}; {advice}"]
        return facts

    def _faces(self, rows: Rows) -> list[Face]:
        """Return the faces of an image; their boxes are shares of its longer side."""
        pixels, _ = reduced(rows)
        longer = max(pixels.shape[:2])
        return [Face(f.left / longer, f.top / longer, f.side / longer, f.embedding) for f in self._find(pixels)]

    def _nearest(self, faces: Sequence[Face]) -> tuple[float | None, Face | None]:
        """Return the smallest mean distance to the references, and its face."""
        found = nearest_face(faces, self.faces)
        return (found[1], faces[found[0]]) if found else (None, None)


def _finder(find: FindFaces | None) -> FindFaces:
    """Return the given search for faces, or the search with dlib's networks."""
    find = find or face_finder()
    if find is None:
        raise MissingBackendError(f"comparing with references needs the metrics extra: {INSTALL_METRICS}")
    return find


def _apart(one: Face, other: Face) -> float:
    """Return the distance between the centres of two faces."""
    return float(
        np.hypot(one.left - other.left + (one.side - other.side) / 2, one.top - other.top + (one.side - other.side) / 2)
    )


def _round(distance: float | None) -> float | None:
    return None if distance is None else round(distance, 4)
