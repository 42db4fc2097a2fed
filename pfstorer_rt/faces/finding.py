"""Find faces with dlib (extra `metrics`), for framing, losses, metrics and references."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pfstorer_rt.faces.dlib import SAME_PERSON, Embedding, Points, face_models, load_dlib, mean_distance, to_uint8
from pfstorer_rt.imaging.bands import Resized
from pfstorer_rt.imaging.rows import (
    Pixels,
    Rows,
    Spool,
    bands,
    from_pixels,
    read_ahead,
    read_pixels,
    read_whole,
    to_pixels,
)

LEAST = 512
"""Longer side in pixels to which a smaller image is enlarged, because dlib finds only faces of 80 pixels or more."""
LONGER_SIDES = (1024, 2048, 4096)
"""Longer sides to which a larger image is reduced, tried in order until a face is found."""
SEARCHED = 2048
"""Longer side in pixels to which an image to be restored is reduced before faces are searched."""
LANDMARK_SIDE = 512
"""Longer side in pixels of the image for landmark measurements; the paper's images have this size."""

CERTAIN = 0.25
"""Smallest side of a face in a turned image, as a share of the shorter side, if it is not known whose face it is."""
REMEMBERED = 64
"""Images whose boxes are kept: learning a person searches each photograph for its frame, its embedding and losses."""


class Box(NamedTuple):
    """The square around a face, from the brows to the chin, in pixels of its image."""

    left: float
    top: float
    side: float


class Face(NamedTuple):
    """A face: its box, as in `Box`, and its embedding."""

    left: float
    top: float
    side: float
    embedding: Embedding


FindFaces = Callable[[Pixels], Sequence[Face]]
"""find(pixels): the faces of an image (H, W, 3) in [0, 1], the largest first, with their embeddings."""

_remembered: dict[tuple[bytes, tuple[int, ...], str, tuple[int, ...]], tuple[Box, ...]] = {}
"""Boxes by the digest, shape and type of an image and the sides of its search; the oldest image is the first."""


def find_boxes(pixels: Pixels, sides: Sequence[int] = LONGER_SIDES) -> list[Box]:
    """Find the faces of an image (H, W, 3) in [0, 1]; the largest face is the first.

    An image with a longer side under 512 pixels is enlarged to 512. A larger image is reduced to each of `sides` in
    turn, until a face is found. An image of up to 1024 pixels without a face is searched again at double size.
    Boxes of the last `REMEMBERED` images are kept. Raises `MissingBackendError` when the `metrics` extra is not
    installed.
    """
    detector = load_dlib()[0]
    content = hashlib.sha256(np.ascontiguousarray(pixels).data).digest()
    image = content, pixels.shape, pixels.dtype.str, tuple(sides)
    boxes = _remembered.get(image)
    if boxes is None:
        boxes = _remembered[image] = tuple(_search(detector, pixels, sides))
        for oldest in list(_remembered)[:-REMEMBERED]:
            _remembered.pop(oldest, None)  # another thread may have removed it
    return list(boxes)


def _search(detector: Any, pixels: Pixels, sides: Sequence[int]) -> list[Box]:
    """Search an image as described in `find_boxes`."""
    longer = max(pixels.shape[:2])
    for most in sides:
        scale = float(np.clip(longer, LEAST, most)) / longer
        image = to_uint8(resized(pixels, scale))
        found = detector(image, 0)
        if found or longer <= most:
            break
    if not found and longer <= LONGER_SIDES[0]:
        found = detector(image, 1)
    boxes = [Box(box.left() / scale, box.top() / scale, box.width() / scale) for box in found]
    return sorted(boxes, key=lambda box: -box.side)


def find_largest(pixels: Pixels) -> Box | None:
    """Return the largest face of an image (H, W, 3) in [0, 1], None without a face."""
    return next(iter(find_boxes(pixels)), None)


def reduced(source: Rows) -> tuple[Pixels, float]:
    """Return the pixels of an image, reduced to a longer side of at most `SEARCHED`, and the scale of the reduction."""
    scale = min(1.0, SEARCHED / max(source.height, source.width))
    height, width = (max(1, round(n * scale)) for n in (source.height, source.width))
    small = Resized(source, height, width, antialias=scale < 1)
    read_rows = bands(height, source.width, round(12 / scale))  # a row of the result needs 1 / scale rows of the source
    return np.concatenate(list(read_ahead(partial(read_pixels, small), read_rows))), scale


def dlib_shape(pixels: Pixels, box: Box) -> Any:
    """Return dlib's 68 landmarks of the face in a box of (H, W, 3) in [0, 1], in pixels of the same image."""
    import dlib

    left, top, right, bottom = (round(n) for n in (box.left, box.top, box.left + box.side - 1, box.top + box.side - 1))
    return load_dlib()[1](to_uint8(pixels), dlib.rectangle(left, top, right, bottom))


def embed_box(pixels: Pixels, box: Box) -> Embedding:
    """Return dlib's embedding (128,) of the face in a box of (H, W, 3) in [0, 1]."""
    descriptor = load_dlib()[2](to_uint8(pixels), dlib_shape(pixels, box))
    return np.array(descriptor, dtype=np.float64)


def embed_largest(pixels: Pixels) -> Embedding | None:
    """Return dlib's embedding (128,) of the largest face of (H, W, 3) in [0, 1], None without a face."""
    box = find_largest(pixels)
    return None if box is None else embed_box(pixels, box)


def embed_all(pixels: Pixels) -> list[Face]:
    """Return all faces of (H, W, 3) in [0, 1] with their embeddings; the largest face is the first."""
    return [Face(*box, embed_box(pixels, box)) for box in find_boxes(pixels)]


def face_embedder() -> Callable[[Pixels], Embedding | None] | None:
    """Return `embed_largest`, or None when the `metrics` extra is not installed."""
    return embed_largest if face_models() else None


def face_finder() -> Callable[[Pixels], list[Face]] | None:
    """Return `embed_all`, or None when the `metrics` extra is not installed."""
    return embed_all if face_models() else None


def landmarks_at_side(pixels: Pixels, box: Box) -> Points:
    """Return 68 landmarks (68, 2), (x, y) in pixels of `at_landmark_side(pixels)`, of the face in a box of `pixels`."""
    scale = LANDMARK_SIDE / max(pixels.shape[:2])
    shape = dlib_shape(at_landmark_side(pixels), Box(*(scale * n for n in box)))
    return np.array([(point.x, point.y) for point in shape.parts()], dtype=np.float64)


def at_landmark_side(pixels: Pixels) -> Pixels:
    """Resize (H, W, 3) so that its longer side has `LANDMARK_SIDE` pixels, aspect kept."""
    from skimage.transform import resize

    height, width = pixels.shape[:2]
    scale = LANDMARK_SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return np.asarray(resize(pixels, size, order=1, anti_aliasing=scale < 1), dtype=np.float32)


def find_turned(find: FindFaces, pixels: Pixels, known: Sequence[Embedding] = ()) -> tuple[int, list[Face]]:
    """Return the faces of an image (H, W, 3) in [0, 1], and the quarter turns clockwise after which they are upright.

    The image is turned only if it has no face as it is. The faces are in pixels of the turned image. known: embeddings
    of the person. What resembles a face after a turn counts only if it resembles the person, or without `known`, if it
    is large: in 100 degraded images without a detected face, five had a wrong one in another orientation. Among several
    orientations, the one with the largest face counts. Without a face in any orientation, the result is (0, []).
    """
    found = {0: list(find(pixels))}
    if not found[0]:
        for turns in (1, 2, 3):
            faces = list(find(np.ascontiguousarray(np.rot90(pixels, -turns))))
            large = bool(faces) and faces[0].side >= CERTAIN * min(pixels.shape[:2])
            if is_among(known, faces) if known else large:
                found[turns] = faces
    turns = max(found, key=lambda turns: max((face.side for face in found[turns]), default=0.0))
    return turns, found[turns]


def describe_place(left: float, top: float, side: float) -> str:
    """Return the place of a face in pixels in words, for notes; a face may begin outside of the image."""
    return f"{side:.0f} pixels wide, {max(0.0, left):.0f} from the left and {max(0.0, top):.0f} from the top"


def turned_by(turns: int) -> str:
    """Return 1 to 3 quarter turns clockwise in words, for notes."""
    return f"turned by {('90 degrees clockwise', '180 degrees', '90 degrees anticlockwise')[turns - 1]}"


def nearest_face(faces: Sequence[Face], known: Sequence[Embedding]) -> tuple[int, float] | None:
    """Return the number of the face nearest to known embeddings, and its mean distance to them.

    Returns None without a face or without known embeddings.
    """
    distances = [mean_distance(face.embedding, known) for face in faces] if known else []
    measured = [(distance, number) for number, distance in enumerate(distances) if distance is not None]
    if not measured:
        return None
    distance, number = min(measured)
    return number, distance


def is_among(known: Sequence[Embedding], faces: Sequence[Face]) -> bool:
    """Whether one of the faces is the person with the known embeddings."""
    nearest = nearest_face(faces, known)
    return nearest is not None and nearest[1] <= SAME_PERSON


def shrunk(pixels: Pixels, side: int) -> tuple[Pixels, float]:
    """Return (H, W, 3) reduced to a longer side of at most `side` pixels, and the scale of the reduction."""
    scale = min(1.0, side / max(pixels.shape[:2]))
    return resized(pixels, scale), scale


def resized(pixels: Pixels, scale: float) -> Pixels:
    """Resize (H, W, 3) by a factor."""
    if scale == 1:
        return pixels
    height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
    return to_pixels(read_whole(Resized(Spool.of(from_pixels(pixels)), height, width, antialias=scale < 1)))
