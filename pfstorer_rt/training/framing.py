"""Photographs cut to the face that is learned: in a snapshot it is small, not in the middle, or not the only one.

The paper learns from portraits. Its squares are cut at random, without alignment (PFStorer section 4.1), and so they
are here, out of what is framed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.faces.dlib import INSTALL_METRICS, SAME_PERSON, Embedding, identity_distance, mean_distance
from pfstorer_rt.faces.finding import Face, face_finder
from pfstorer_rt.training.data import center_crop, read_photo

SQUARE = 2.0
"""Side of the square around a face, in sides of its box; about that of a portrait."""
DOWN = 0.57
"""Where in the square the middle of the box is, from its top: dlib's boxes leave out the forehead."""
LARGE = 0.35
"""Side of a face's box, in short sides of the photograph, from which one in the middle is a portrait already."""
LONG = 1.25
"""Longer side of a portrait, in shorter ones, above which squares that are cut at random would miss the face."""
FEW = 4
"""A face of less than the tile's side by this is too small to learn much from."""


def read_references(
    paths: Sequence[Path], config: PersonalizeConfig, tile: int, note: Callable[[str], None]
) -> list[torch.Tensor]:
    """Read photographs, (3, H, W) in [0, 1] each, framed to the person's face.

    Of several faces it is the one most like those in the photographs that show one alone, else the largest. Without
    a face the central square is kept. With `config.framing` "none", or without the `metrics` extra, photographs are
    left whole. note: called with a line for each that may not serve. Raises `BadFileError`.
    """
    photos = [read_photo(path) for path in paths]  # all of them, before anything is said of one
    if config.framing == "none":
        return photos
    if (find := face_finder()) is None:
        note(f"faces are not looked for, photographs are taken as they are; for snapshots: {INSTALL_METRICS}")
        return photos
    found = [find(photo.permute(1, 2, 0).numpy()) for photo in photos]
    alone = [faces[0].embedding for faces in found if len(faces) == 1]
    chosen = [choose_face(faces, alone) for faces in found]
    for i, path in enumerate(paths):
        others = [face.embedding for j, face in enumerate(chosen) if face and j != i]
        for remark in _remarks(found[i], chosen[i], others, tile):
            note(f"{path}: {remark}")
    pairs = zip(photos, chosen, strict=True)
    return [frame_face(photo, face) if face else center_crop(photo, min(photo.shape[-2:])) for photo, face in pairs]


def choose_face(faces: Sequence[Face], alone: Sequence[Embedding]) -> Face | None:
    """Return the face most like those that were alone in their photographs; without any such, the first."""
    if not faces or not alone:
        return faces[0] if faces else None
    return min(faces, key=lambda face: mean_distance(face.embedding, alone) or 0.0)


def _remarks(faces: Sequence[Face], face: Face | None, others: Sequence[Embedding], tile: int) -> list[str]:
    if face is None:
        return ["no face found; its middle is learned"]
    found = []
    if len(faces) > 1:
        place = f"{face.side:.0f} pixels wide, {face.left:.0f} from the left and {face.top:.0f} from the top"
        found.append(f"{len(faces)} faces; the one that is learned is {place}")
    distance = median(identity_distance(face.embedding, other) or 0.0 for other in others) if others else 0.0
    if distance > SAME_PERSON:
        found.append(
            f"its face may be another person's: {distance:.2f} from those of the other photographs, of the same "
            f"person it is under {SAME_PERSON}"
        )
    if face.side < tile / FEW:
        found.append(f"its face is {face.side:.0f} pixels wide; from {tile // FEW} on it gives a better likeness")
    return found


def frame_face(photo: torch.Tensor, face: Face) -> torch.Tensor:
    """Cut a square around a face out of (3, H, W), as large as the photograph allows.

    A portrait, which is about square with a large face in the middle, is left whole.
    """
    height, width = photo.shape[-2:]
    short = min(height, width)
    starts = face.top - (height - short) / 2, face.left - (width - short) / 2
    inside = all(-0.1 * face.side <= start <= short - 0.9 * face.side for start in starts)
    if inside and face.side >= LARGE * short and max(height, width) <= LONG * short:
        return photo
    side = min(short, round(SQUARE * face.side))
    top = _start(face.top, face.side, DOWN, side, height)
    left = _start(face.left, face.side, 0.5, side, width)
    return photo[:, top : top + side, left : left + side].contiguous()


def _start(start: float, length: float, share: float, side: int, whole: int) -> int:
    """Where a span of `side` begins that has the middle of another at a share of it, all of it inside if it can be."""
    wanted = start + length / 2 - share * side
    inside = min(max(wanted, start + length - side), start) if length < side else wanted
    return round(min(max(0.0, inside), whole - side))
