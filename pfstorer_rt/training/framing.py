"""Read reference photographs and crop them around the face, which may be small, off-centre or one of several.

The paper trains on portraits. Its training crops are random and not aligned to the face (PFStorer section 4.1). Here
the random crops come from the framed photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.faces.dlib import INSTALL_METRICS, Embedding, mean_distance
from pfstorer_rt.faces.finding import (
    Face,
    FindFaces,
    describe_place,
    face_finder,
    find_turned,
    is_among,
    turned_by,
)
from pfstorer_rt.files import show_path
from pfstorer_rt.imaging.files import resize_bicubic
from pfstorer_rt.imaging.rows import Spool, read_whole
from pfstorer_rt.imaging.shown import shown_to_networks
from pfstorer_rt.progress import OnProgress, StageProgress, ignore_progress
from pfstorer_rt.training.data import center_crop, read_photo
from pfstorer_rt.training.selection import NO_FACE, Candidate, Finding, candidate, judge, mixed_people

SQUARE = 2.0
"""Side of the crop divided by the side of the face's box; a portrait has about this ratio."""
DOWN = 0.57
"""Vertical position of the box's centre in the crop (0 is the top): dlib's boxes do not include the forehead."""
LARGE = 0.35
"""Smallest side of a centred face's box divided by the photograph's short side, for a portrait."""
LONG = 1.25
"""Largest aspect ratio of a portrait; random crops of a longer photograph would miss the face."""
FEW = 4
"""A face whose side is smaller than the tile's side divided by this has too few pixels for a good likeness."""
MOST = 3.0
"""Largest short side of a framed photograph, in tiles; random crops are reduced to one tile. It limits the memory."""


class Reference(NamedTuple):
    """A reference photograph."""

    path: Path
    photo: torch.Tensor
    """Framed pixels, (3, h, w) in [0, 1]."""
    left_out: str = ""
    """Reason why the photograph is not used; empty for a photograph that is used."""


class _Measured(NamedTuple):
    """What is kept of a photograph after it was read at full size."""

    faces: list[Face]
    face: Face | None
    """The person's face."""
    turns: int
    """Quarter turns clockwise after which the faces are upright."""
    candidate: Candidate
    framed: torch.Tensor
    """(3, h, w) in [0, 1]."""


def read_references(
    paths: Sequence[Path],
    config: PersonalizeConfig,
    tile: int,
    note: Callable[[str], None],
    find: FindFaces | None = None,
    on_progress: OnProgress = ignore_progress,
) -> list[Reference]:
    """Read photographs, crop them around the person's face, and choose which of them are used.

    Among several faces, the person is the face most similar to the faces in the photographs with one face; without such
    photographs, the person who is in every photograph, else the largest face. A photograph with faces in another
    orientation alone is turned. A photograph without a face gets a centre crop. Photographs that cannot be read are
    left out. With `config.framing` "none", or without the `metrics` extra, photographs stay whole. Unsuitable
    photographs are left out as `selection.judge` finds, unless `config.keep_all`; without faces, only copies are. Only
    one photograph is in memory at its full size. note: called with a line for each unsuitable photograph. find: None
    selects dlib's detector. Raises `BadFileError` if no photograph can be read, and `SettingError` if the person is not
    clear, unless `config.keep_all`: they show several people and none is in most of them, or several are in all of them
    and none is alone in one.
    """
    find = find or face_finder() if config.framing == "face" else None
    if find is None and config.framing == "face":
        note(f"photographs are used without cropping to the face; to crop snapshots: {INSTALL_METRICS}")

    def measure(path: Path, photo: torch.Tensor, faces: list[Face], face: Face | None, turns: int) -> _Measured:
        photo = photo.rot90(-turns, (1, 2))
        framed = frame_photo(photo, face) if find else photo
        return _Measured(faces, face, turns, candidate(path, photo, face), limit_size(framed, round(MOST * tile)))

    found: dict[Path, _Measured] = {}
    errors = []
    for number, path in enumerate(paths):
        on_progress(StageProgress("photographs", number, len(paths)))
        try:
            photo = read_photo(path)
        except BadFileError as error:
            errors.append(error)
            continue
        turns, faces = find_turned(find, photo.permute(1, 2, 0).numpy()) if find else (0, [])
        found[path] = measure(path, photo, faces, faces[0] if faces else None, turns)
    on_progress(StageProgress("photographs", len(paths), len(paths)))
    if errors and not found:
        raise errors[0]
    for reason in errors:
        note(f"left out: {reason}")
    alone = [measured.faces[0].embedding for measured in found.values() if len(measured.faces) == 1]
    if not alone and not config.keep_all:
        alone = common_faces([measured.faces for measured in found.values() if measured.faces])
        if len(alone) > 1:
            raise SettingError(
                f"{len(alone)} people are in every photograph, and none of them is alone in one; add a photograph that "
                "shows the person alone, or crop one"
            )
    for path, measured in found.items():
        face = choose_face(measured.faces, alone)
        if face is not measured.face:  # not the largest face of a group: its crop is made from the file again
            found[path] = measure(path, read_photo(path), measured.faces, face, measured.turns)
    candidates = [measured.candidate for measured in found.values()]
    if not config.keep_all and (people := mixed_people(candidates)):
        shown = " / ".join(", ".join(path.name for path in group[:3]) for group in people[:3])
        raise SettingError(
            f"the photographs show several people, and none of them is in most photographs (such as {shown}); keep the "
            "photographs of one person"
        )
    findings = judge(candidates, search=find is not None)
    references = []
    for (path, measured), finding in zip(found.items(), findings, strict=True):
        left_out = finding.reason if finding and finding.leave_out and not config.keep_all else ""
        for remark in [f"left out: {left_out}"] if left_out else _remarks(measured, finding, tile):
            note(f"{show_path(path)}: {remark}")
        references.append(Reference(path, measured.framed, left_out))
    return references


def limit_size(photo: torch.Tensor, side: int) -> torch.Tensor:
    """Reduce (3, H, W) in [0, 1] until its short side is at most `side` pixels."""
    height, width = photo.shape[-2:]
    ratio = side / min(height, width)
    if ratio >= 1:
        return photo
    size = max(side, round(height * ratio)), max(side, round(width * ratio))
    return (resize_bicubic(photo[None] * 2 - 1, size, antialias=True)[0] + 1) / 2


def as_restored(photo: torch.Tensor) -> torch.Tensor:
    """Return (3, H, W) in [0, 1] as restoring shows it to the networks: a photograph without colours in skin tones."""
    rows = Spool.of((photo * 2 - 1).numpy())
    shown = shown_to_networks(rows).rows
    return photo if shown is rows else torch.from_numpy((read_whole(shown) + 1) / 2)


def used_references(references: Sequence[Reference]) -> list[Reference]:
    """Return the photographs that are not left out."""
    return [reference for reference in references if not reference.left_out]


def common_faces(photos: Sequence[Sequence[Face]]) -> list[Embedding]:
    """Return an embedding of each person who is in every one of at least two photographs with these faces."""
    if len(photos) < 2:
        return []
    fewest = min(range(len(photos)), key=lambda i: len(photos[i]))
    people = [face.embedding for face in photos[fewest]]
    return [person for person in people if all(is_among([person], faces) for faces in photos)]


def choose_face(faces: Sequence[Face], alone: Sequence[Embedding]) -> Face | None:
    """Return the face most similar to the embeddings in `alone`; the first face when `alone` is empty."""
    if not faces or not alone:
        return faces[0] if faces else None
    return min(faces, key=lambda face: mean_distance(face.embedding, alone) or 0.0)


def _remarks(measured: _Measured, finding: Finding | None, tile: int) -> list[str]:
    """Return remarks on a photograph that is used."""
    faces, face = measured.faces, measured.face
    remarks = [finding.reason] if finding else []
    if measured.turns:
        remarks.append(
            f"a face was found with the photograph {turned_by(measured.turns)}; it is used in this orientation"
        )
    if face is None:
        return [f"{remark}; using the centre crop" if remark == NO_FACE else remark for remark in remarks]
    if len(faces) > 1:
        place = describe_place(face.left, face.top, face.side)
        remarks.append(f"{len(faces)} faces found; using the one that is {place}")
    if round(face.side) < tile // FEW:
        remarks.append(f"the face is {face.side:.0f} pixels wide; {tile // FEW} or more give a better likeness")
    return remarks


def frame_photo(photo: torch.Tensor, face: Face | None) -> torch.Tensor:
    """Crop (3, H, W) around a face, to the central square without a face."""
    return frame_face(photo, face) if face else center_crop(photo, min(photo.shape[-2:]))


def frame_face(photo: torch.Tensor, face: Face) -> torch.Tensor:
    """Crop (3, H, W) to a square around a face, inside the photograph.

    A portrait (about square, with a large centred face) stays whole.
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
    """Return the start of a span of `side`, inside 0 ... `whole`, with the face's centre at the fraction `share`."""
    wanted = start + length / 2 - share * side
    inside = min(max(wanted, start + length - side), start) if length < side else wanted
    return round(min(max(0.0, inside), whole - side))
