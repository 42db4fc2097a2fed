"""Find reference photographs that would harm the learning: copies, other people, missing and blurred faces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import median, median_low
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.faces.dlib import SAME_PERSON, Embedding, identity_distance
from pfstorer_rt.faces.finding import Face
from pfstorer_rt.files import show_path
from pfstorer_rt.imaging.files import resize_bicubic

THUMBNAIL = 32
"""Side of the grey images that are compared to find copies, in pixels."""
COPY = 0.05
"""Two images are copies if no pixel of their thumbnails, in [0, 1], differs by more than this."""
FACE_SIDE = 128
"""Side to which a face is resized before its sharpness is measured, in pixels."""
BLURRED = 0.1
"""A face is blurred if its sharpness, divided by the median of the others, is below this."""
DOUBTFUL = 0.5
"""Distance of a face to the others from which it is compared with the distances among the others."""
UNLIKE = 1.4
"""A face is doubtful if its distance to the others is more than this many times the median among the others."""
ENOUGH = 3
"""Blurred photographs are left out if at least this many others are used; as many faces show who the person is."""
NO_FACE = "no face found"

Grey = npt.NDArray[np.float32]


class Candidate(NamedTuple):
    """What the choice of photographs depends on."""

    path: Path
    size: int
    """Number of pixels of the photograph."""
    thumbnail: Grey
    """(THUMBNAIL, THUMBNAIL) in [0, 1]."""
    embedding: Embedding | None = None
    """Embedding of the person's face, None without a face."""
    sharpness: float = 0.0
    """Sharpness of the person's face, as `face_sharpness` returns it."""


class Finding(NamedTuple):
    """What is wrong with a photograph, and whether to leave it out."""

    reason: str
    leave_out: bool


def candidate(path: Path, photo: torch.Tensor, face: Face | None) -> Candidate:
    """Measure a photograph (3, H, W) in [0, 1] and the person's face in it."""
    thumbnail = _grey_square(photo, THUMBNAIL)
    if face is None:
        return Candidate(path, photo[0].numel(), thumbnail)
    return Candidate(path, photo[0].numel(), thumbnail, face.embedding, face_sharpness(photo, face))


def face_sharpness(photo: torch.Tensor, face: Face) -> float:
    """Return the variance of the Laplacian of a face in (3, H, W), relative to the variance of the face's pixels.

    The face is resized to `FACE_SIDE`, so that faces of different sizes can be compared.
    """
    top, left, side = max(0, round(face.top)), max(0, round(face.left)), max(1, round(face.side))
    grey = _grey_square(photo[:, top : top + side, left : left + side], FACE_SIDE)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float(np.var(around - 4 * grey[1:-1, 1:-1]) / (np.var(grey) + 1e-6))


def _grey_square(image: torch.Tensor, side: int) -> Grey:
    """Resize (3, H, W) in [0, 1] to a grey square (side, side)."""
    resized = resize_bicubic(image[None] * 2 - 1, (side, side), antialias=True)
    grey: Grey = ((resized[0].mean(0) + 1) / 2).numpy()
    return grey


def judge(candidates: Sequence[Candidate], search: bool = True) -> list[Finding | None]:
    """Return the first finding about each photograph, None for a good one.

    search: whether faces were searched; without, only copies are found. At least one photograph is not left out.
    """
    found = {i: Finding(f"almost the same image as {show_path(j)}", True) for i, j in _copies(candidates).items()}
    originals = [i for i in range(len(candidates)) if i not in found]
    faces = [i for i in originals if candidates[i].embedding is not None]
    if search:
        found |= {i: Finding(NO_FACE, bool(faces)) for i in originals if i not in faces}
    others = _other_people({i: candidates[i].embedding for i in faces})
    agreed = len(faces) >= ENOUGH and 2 * len(others) < len(faces)
    found |= {i: Finding(_describe(distance), agreed) for i, distance in others.items()}
    same = [i for i in faces if i not in others]
    blurred = _blurred({i: candidates[i].sharpness for i in same})
    enough = len(same) - len(blurred) >= ENOUGH
    found |= {i: Finding("the face is blurred in comparison with the other photographs", enough) for i in blurred}
    doubtful = _doubtful({i: candidates[i].embedding for i in same if i not in blurred})
    found |= {i: Finding(_compare(*distances), False) for i, distances in doubtful.items()}
    return [found.get(i) for i in range(len(candidates))]


def _copies(candidates: Sequence[Candidate]) -> dict[int, Path]:
    """Return {number of a copy: path of its original}; the original is the photograph with the most pixels."""
    originals: list[int] = []
    copies = {}
    for i in sorted(range(len(candidates)), key=lambda i: (-candidates[i].size, candidates[i].path)):
        near = [j for j in originals if _same_image(candidates[i].thumbnail, candidates[j].thumbnail)]
        if near:
            copies[i] = candidates[near[0]].path
        else:
            originals.append(i)
    return copies


def _same_image(one: Grey, other: Grey) -> bool:
    return bool(np.abs(one - other).max() <= COPY)


def _other_people(embeddings: dict[int, Embedding | None]) -> dict[int, float]:
    """Return {number: distance} of the faces that differ from more than half of the others."""
    far = {}
    for i in embeddings:
        distances = [_distance(embeddings, i, j) for j in embeddings if j != i]
        if distances and median_low(distances) > SAME_PERSON:
            far[i] = median_low(distances)
    return far


def mixed_people(candidates: Sequence[Candidate]) -> list[list[Path]]:
    """Return the photographs of each person if no person is in most of them; an empty list for one person.

    A person here is at least two faces, each within `SAME_PERSON` of another of them.
    """
    faces = {i: one.embedding for i, one in enumerate(candidates)}
    faces = {i: embedding for i, embedding in faces.items() if embedding is not None}
    if 2 * len(_other_people(faces)) < len(faces):
        return []
    groups: list[list[int]] = []
    for i in faces:
        near = [group for group in groups if any(_distance(faces, i, j) <= SAME_PERSON for j in group)]
        groups = [group for group in groups if group not in near] + [[i, *(j for group in near for j in group)]]
    people = [sorted(group) for group in groups if len(group) > 1]
    return [[candidates[i].path for i in group] for group in sorted(people)] if len(people) > 1 else []


def _doubtful(embeddings: dict[int, Embedding | None]) -> dict[int, tuple[float, float]]:
    """Return {number: (distance to the others, distance among the others)} of faces unlike the others.

    Relatives and people who look alike may be closer than `SAME_PERSON`.
    """
    found = {}
    for i in embeddings if len(embeddings) > ENOUGH else ():
        others = [j for j in embeddings if j != i]
        own = median_low(_distance(embeddings, i, j) for j in others)
        among = median(_distance(embeddings, j, k) for j, k in combinations(others, 2))
        if own > max(DOUBTFUL, UNLIKE * among):
            found[i] = own, among
    return found


def _distance(embeddings: dict[int, Embedding | None], i: int, j: int) -> float:
    return identity_distance(embeddings[i], embeddings[j]) or 0.0


def _compare(own: float, among: float) -> str:
    return (
        f"may show another person: its distance to the other photographs is {own:.2f}, and their distance to each "
        f"other is {among:.2f}"
    )


def _describe(distance: float) -> str:
    return (
        f"may show another person: its distance to the other photographs is {distance:.2f}, photographs of one "
        f"person are usually within {SAME_PERSON}"
    )


def _blurred(sharpness: dict[int, float]) -> list[int]:
    """Return the numbers of the faces that are much less sharp than the median of the others."""
    others = {i: [value for j, value in sharpness.items() if j != i] for i in sharpness}
    return [i for i, values in others.items() if values and sharpness[i] < BLURRED * median(values)]
