"""Crop reference photographs to the person's face: in a snapshot the face is small, off-centre or one of several.

The paper learns from portraits. Training crops are random and not aligned to the face (PFStorer section 4.1); here they
are taken from the framed photographs.
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
"""Side of the crop around a face, in sides of the face's box; a portrait has about this ratio."""
DOWN = 0.57
"""Height of the box's centre in the crop, from the top: dlib's boxes do not include the forehead."""
LARGE = 0.35
"""Least side of a centred face's box, in short sides of the photograph, in a photograph that is already a portrait."""
LONG = 1.25
"""Largest aspect ratio of a portrait; random crops of a longer photograph would miss the face."""
FEW = 4
"""A face smaller than the tile divided by this has too few pixels for a good likeness."""


def read_references(
    paths: Sequence[Path], config: PersonalizeConfig, tile: int, note: Callable[[str], None]
) -> list[torch.Tensor]:
    """Read photographs, (3, H, W) in [0, 1] each, and crop them around the person's face.

    Among several faces, the person is the face most similar to those in the photographs with one face, or else the
    largest face. A photograph without a face is cropped to its centre. With `config.framing` "none", or without the
    `metrics` extra, photographs stay whole. note: called with a line on each photograph that may serve badly.
    Raises `BadFileError`.
    """
    photos = [read_photo(path) for path in paths]  # all photographs, before the first note
    if config.framing == "none":
        return photos
    if (find := face_finder()) is None:
        note(f"photographs are used without cropping to the face; to crop snapshots: {INSTALL_METRICS}")
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
    """Return the face most similar to those in `alone`; without any of them, the first face."""
    if not faces or not alone:
        return faces[0] if faces else None
    return min(faces, key=lambda face: mean_distance(face.embedding, alone) or 0.0)


def _remarks(faces: Sequence[Face], face: Face | None, others: Sequence[Embedding], tile: int) -> list[str]:
    if face is None:
        return ["no face found; using the centre crop"]
    found = []
    if len(faces) > 1:
        place = f"{face.side:.0f} pixels wide, {face.left:.0f} from the left and {face.top:.0f} from the top"
        found.append(f"{len(faces)} faces found; using the one that is {place}")
    distance = median(identity_distance(face.embedding, other) or 0.0 for other in others) if others else 0.0
    if distance > SAME_PERSON:
        found.append(
            f"may show another person: its distance to the other photographs is {distance:.2f}, photographs of one "
            f"person are usually within {SAME_PERSON}"
        )
    if face.side < tile / FEW:
        found.append(f"the face is {face.side:.0f} pixels wide; {tile // FEW} or more give a better likeness")
    return found


def frame_face(photo: torch.Tensor, face: Face) -> torch.Tensor:
    """Crop (3, H, W) to a square around a face, inside the photograph.

    A portrait, which is about square with a large centred face, stays whole.
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
    """Return the start of a span of `side` that has the centre of the face at `share`, inside 0 ... `whole`."""
    wanted = start + length / 2 - share * side
    inside = min(max(wanted, start + length - side), start) if length < side else wanted
    return round(min(max(0.0, inside), whole - side))
