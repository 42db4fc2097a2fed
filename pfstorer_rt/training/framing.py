"""Photographs cut to the face that is learned: in a snapshot it is small and not in the middle.

The paper learns from portraits. Its squares are cut at random, without alignment (PFStorer section 4.1), and so they
are here, out of what is framed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.evaluation.faces import Face, face_finder
from pfstorer_rt.training.data import read_photo

SQUARE = 2.0
"""Side of the square around a face, in sides of its box; about that of a portrait."""
DOWN = 0.57
"""Where in the square the middle of the box is, from its top: dlib's boxes leave out the forehead."""
LARGE = 0.35
"""Side of a face's box, in short sides of the photograph, from which one in the middle is a portrait already."""
FEW = 4
"""A face of less than the tile's side by this is too small to learn much from."""


def read_references(
    paths: Sequence[Path], config: PersonalizeConfig, tile: int, note: Callable[[str], None]
) -> list[torch.Tensor]:
    """Read photographs, (3, H, W) in [0, 1] each, framed to their largest face.

    With `config.framing` "none", or without the `metrics` extra, they are left whole. note: called with a line for
    each photograph that shows no face, several faces, or a very small one. Raises `BadFileError`.
    """
    photos = [read_photo(path) for path in paths]  # all of them, before anything is said of one
    if config.framing == "none" or (find := face_finder()) is None:
        return photos
    framed = []
    for path, photo in zip(paths, photos, strict=True):
        faces = find(photo.permute(1, 2, 0).numpy())
        for remark in _remarks(faces, tile):
            note(f"{path}: {remark}")
        framed.append(frame_face(photo, faces[0]) if faces else photo)
    return framed


def _remarks(faces: Sequence[Face], tile: int) -> list[str]:
    if not faces:
        return ["no face found; the middle of the photograph is learned"]
    found = []
    if len(faces) > 1:
        found.append(f"{len(faces)} faces; the largest is learned")
    if faces[0].side < tile / FEW:
        found.append(f"its face is {faces[0].side:.0f} pixels wide; from {tile // FEW} on it gives a better likeness")
    return found


def frame_face(photo: torch.Tensor, face: Face) -> torch.Tensor:
    """Cut a square around a face out of (3, H, W), as large as the photograph allows.

    A portrait, whose face is large and inside the central square, which is what is learned otherwise, is left whole.
    """
    height, width = photo.shape[-2:]
    short = min(height, width)
    starts = face.top - (height - short) / 2, face.left - (width - short) / 2
    inside = all(-0.1 * face.side <= start <= short - 0.9 * face.side for start in starts)
    if inside and face.side >= LARGE * short:
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
