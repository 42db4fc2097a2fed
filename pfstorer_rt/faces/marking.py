"""Draw the faces of an image: the person's face, and the faces of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pfstorer_rt.faces.dlib import SAME_PERSON, Embedding, to_uint8
from pfstorer_rt.faces.finding import Face, embed_all, nearest_face, shrunk
from pfstorer_rt.imaging.rows import Pixels

PERSON, OTHER = "#2f9e6e", "#c2703d"
"""Colours of the frames."""


@dataclass(frozen=True)
class Marked:
    """The faces of an image, the largest first, and which of them is the person's."""

    image: Image.Image
    """The image, reduced, with a frame around every face."""
    faces: int
    person: int | None
    """Number of the person's face; None if no face is within the distance of one person."""
    compared: bool
    """Whether the faces were compared with photographs of the person; otherwise the largest face is the person's."""


def mark_faces(pixels: Pixels, known: Sequence[Embedding] = (), side: int = 640) -> Marked:
    """Find the faces of (H, W, 3) in [0, 1] and draw a frame around each.

    known: embeddings of photographs of the person. side: longer side of the returned image in pixels.
    Raises `MissingBackendError` without the `metrics` extra.
    """
    faces = embed_all(pixels)
    person = choose_person(faces, known)
    small, scale = shrunk(pixels, side)
    image = Image.fromarray(to_uint8(small))
    draw, width = ImageDraw.Draw(image), max(2, max(image.size) // 90)
    for number, face in enumerate(faces):
        left, top, length = (scale * value for value in (face.left, face.top, face.side))
        colour = PERSON if number == person else OTHER
        draw.rounded_rectangle((left, top, left + length, top + length), length / 8, outline=colour, width=width)
    return Marked(image, len(faces), person, bool(known))


def choose_person(faces: Sequence[Face], known: Sequence[Embedding]) -> int | None:
    """Return the number of the face nearest to the known embeddings, or of the largest face without any.

    Returns None if there is no face, or if the nearest one is farther than faces of one person are.
    """
    if not faces or not known:
        return 0 if faces else None
    found = nearest_face(faces, known)
    return found[0] if found and found[1] <= SAME_PERSON else None
