"""The faces of an image on which the identity acts, and the soft map around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.errors import MissingBackendError, SettingError
from pfstorer_rt.faces.dlib import INSTALL_METRICS, SAME_PERSON, Embedding, face_models, identity_distance
from pfstorer_rt.faces.finding import (
    SEARCHED,
    Face,
    FindFaces,
    describe_place,
    embed_box,
    find_boxes,
    find_turned,
    nearest_face,
    reduced,
    turned_by,
)
from pfstorer_rt.imaging.rows import Band, Pixels, Rows
from pfstorer_rt.plan import Manifest
from pfstorer_rt.settings import is_finite

Weights = npt.NDArray[np.float32]

WHOLE, NONE = 0.25, 0.6
"""Distances from a face's box, in sides of the box: the weight is 1 up to the first and 0 from the second."""
BETWEEN = 0.3
"""Between two faces, the weight rises from 0 to 1 while the other face becomes farther away by this distance."""
CERTAIN = 0.5
"""Largest distance at which a second face of an image is the person too, as on a scanned page with several photographs.
It is below dlib's threshold: of 1,548 images of other people, degraded ones included, none was nearer than 0.55."""
LARGEST_SIDE = 10**9
"""Largest width and height of a rectangle in pixels; it may end outside of the image."""


class Area(NamedTuple):
    """A rectangle of an image, in pixels: a face, or what the caller takes as one."""

    left: float
    top: float
    width: float
    height: float

    def distance(self, y: Weights, x: Weights) -> Weights:
        """Return distances of the points (y, x) from the rectangle, in its shorter sides; y (n,), x (m,) -> (n, m)."""
        down = np.maximum(self.top - y, y - self.top - self.height).clip(0)
        across = np.maximum(self.left - x, x - self.left - self.width).clip(0)
        return (np.hypot(down[:, None], across) / min(self.width, self.height)).astype(np.float32)

    def meets(self, other: Area) -> bool:
        """Whether the centre of one of two rectangles is inside the other one."""
        return self._has_centre_of(other) or other._has_centre_of(self)

    def _has_centre_of(self, other: Area) -> bool:
        y, x = other.top + other.height / 2 - self.top, other.left + other.width / 2 - self.left
        return 0 <= y <= self.height and 0 <= x <= self.width


ApplyTo = Literal["matching", "all", "largest"] | Area
"""Where the identity acts: on the face that resembles the person, in the whole image, on the largest face, or on one
rectangle of the input image."""


@dataclass(frozen=True)
class Selection:
    """The chosen faces and the other faces of an image of height x width pixels."""

    height: int
    width: int
    chosen: tuple[Area, ...]
    others: tuple[Area, ...] = ()

    def weights(self, y: npt.ArrayLike, x: npt.ArrayLike) -> Weights:
        """Return the soft map at the points (y, x) of the image with sides of 1: y (n,), x (m,) -> (n, m) in [0, 1].

        The map is exactly 1 near a chosen face, and exactly 0 far from it and on every other face.
        """
        rows, columns = np.asarray(y, np.float32) * self.height, np.asarray(x, np.float32) * self.width
        near = np.min([face.distance(rows, columns) for face in self.chosen], 0)
        found = _rise((NONE - near) / (NONE - WHOLE))
        for other in self.others:
            found = found * _rise((other.distance(rows, columns) - near) / BETWEEN)
        return found


def _rise(share: Weights) -> Weights:
    """Map 0 and less to 0, 1 and more to 1, and values between them to a smooth curve."""
    share = share.clip(0, 1)
    curve: Weights = share * share * (3 - 2 * share)
    return curve


class Mixed:
    """Two results of one image, blended by the soft map of a selection."""

    def __init__(self, base: Rows, person: Rows, selection: Selection) -> None:
        """base, person: images of one size. Where the map is 0, the values are those of `base`."""
        self.base, self.person, self.selection = base, person, selection
        self.height, self.width = base.height, base.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        y, x = (np.arange(start, stop) + 0.5) / self.height, (np.arange(self.width) + 0.5) / self.width
        weights, base = self.selection.weights(y, x), self.base.read(start, stop)
        if not weights.any():
            return base
        return base + weights * (self.person.read(start, stop) - base)


@dataclass(frozen=True)
class Choice:
    """A selection, or None for the whole image; and notes for the user."""

    selection: Selection | None = None
    """In pixels of the image after its turns."""
    notes: tuple[str, ...] = ()
    turns: int = 0
    """Quarter turns clockwise after which the faces of the image are upright."""


class Chooser:
    """Chooses the faces of images on which the identity of an engine acts."""

    def __init__(
        self,
        manifest: Manifest,
        config: RestoreConfig,
        apply_to: ApplyTo = "matching",
        known: Embedding | None = None,
        find: FindFaces | None = None,
    ) -> None:
        """known: embedding of the person; None, and that of another person, select the engine's own. find: None selects
        dlib's networks.

        Raises `SettingError` for an unknown value of `apply_to`, and `MissingBackendError` if "largest" needs the
        `metrics` extra and lacks it.
        """
        if not isinstance(apply_to, Area) and apply_to not in ("matching", "all", "largest"):
            expected = "expected matching, all, largest or a rectangle"
            raise SettingError(f"apply_to {apply_to!r}: {expected}", setting="apply_to")
        self.acts = manifest.identity_name is not None and config.strength != 0
        self.gated, self.apply_to = manifest.strength, apply_to
        own = np.array(manifest.face) if manifest.face else None
        self.apart = identity_distance(known, own) or 0.0
        self.known = own if known is None or self.apart > SAME_PERSON else known
        self.find = find or (_faces if face_models() else None)
        if self.acts and apply_to == "largest" and self.find is None:
            raise MissingBackendError(f"finding the largest face needs the metrics extra: {INSTALL_METRICS}")

    @property
    def searches(self) -> bool:
        """Whether faces are searched in every image."""
        matches = self.apply_to == "matching" and self.known is not None
        return self.acts and self.find is not None and (matches or self.apply_to == "largest")

    @property
    def depends_on_content(self) -> bool:
        """Whether `choose` reads the image."""
        return self.searches or (self.acts and isinstance(self.apply_to, Area))

    def notes(self) -> Iterator[str]:
        """Yield notes on why the person's face cannot be searched in any image."""
        if not self.acts or self.apply_to != "matching":
            return
        if self.find is None:
            yield f"the identity acts on every face of an image; to limit it to the person, {INSTALL_METRICS}"
        elif self.known is None:
            yield (
                "the identity acts on every face of an image, because no embedding of the person's face is known: no "
                "face was found in the photographs of the person, or they were learned without the metrics extra"
            )
        elif self.apart > SAME_PERSON:
            yield (
                f"the reference photographs show another person than this engine (distance {self.apart:.2f}; expected "
                f"at most {SAME_PERSON}); the identity acts on the person of the engine"
            )

    def choose(self, source: Rows) -> Choice:
        """Choose the faces of an image; raises `SettingError` for a rectangle outside the image."""
        if not self.acts or self.apply_to == "all":
            return Choice()
        size = source.height, source.width
        if isinstance(self.apply_to, Area):
            _check_inside(self.apply_to, source)
            return self._with_remark(source, self._select(size, (self.apply_to,), ()))
        if not self.searches:
            return Choice()
        assert self.find is not None
        pixels, scale = reduced(source)
        known = () if self.known is None or self.apply_to == "largest" else (self.known,)
        turns, faces = find_turned(self.find, pixels, known)
        if not turns:
            return self._among(faces, scale, size)
        found = self._among(faces, scale, size[::-1] if turns % 2 else size)
        note = f"a face was found with the image {turned_by(turns)}, so it is restored in this orientation"
        return replace(found, notes=(f"{note}; the result has the orientation of the input", *found.notes), turns=turns)

    def _among(self, faces: Sequence[Face], scale: float, size: tuple[int, int]) -> Choice:
        """Choose among faces in an image of `size` (height, width), found after a reduction by `scale`."""
        areas = _areas(faces, scale)
        if self.apply_to == "largest":
            chosen, remark = ([0] if faces else []), "no face found"
        else:
            chosen, remark = self._matching(faces)
        if not chosen:
            return Choice(None, (f"{remark}; the identity acts on the whole image",) if remark else ())
        if len(faces) == len(chosen):
            return Choice()
        others = [area for number, area in enumerate(areas) if number not in chosen]
        return self._select(size, [areas[number] for number in chosen], others)

    def _with_remark(self, source: Rows, choice: Choice) -> Choice:
        """Add a note to the choice of a rectangle in which no face is found."""
        if self.find is None or choice.selection is None:
            return choice
        (chosen,) = choice.selection.chosen
        pixels, scale = reduced(source)
        if any(face.meets(chosen) for face in _areas(self.find(pixels), scale)):
            return choice
        return Choice(choice.selection, ("no face found in the rectangle; the identity acts there",))

    def _matching(self, faces: Sequence[Face]) -> tuple[list[int], str]:
        """Return the number of the face that resembles the person most, and those of others that certainly do.

        Returns no number, and a remark, if no face resembles the person.
        """
        nearest = nearest_face(faces, () if self.known is None else (self.known,))
        if nearest is None:
            return [], "no face found"
        number, distance = nearest
        if distance <= SAME_PERSON:
            apart = [identity_distance(face.embedding, self.known) for face in faces]
            more = [n for n, d in enumerate(apart) if n != number and d is not None and d <= CERTAIN]
            return [number, *more], ""
        found = "the face does not resemble" if len(faces) == 1 else f"none of {len(faces)} faces resembles"
        return [], f"{found} the person (distance {distance:.3f}; expected at most {SAME_PERSON})"

    def _select(self, size: tuple[int, int], chosen: Sequence[Area], others: Sequence[Area]) -> Choice:
        """Select faces, if the identity of this engine can be limited to a part of the image."""
        if not self.gated:
            note = "this identity has no gated blocks, so it cannot be limited to one face: it acts on the whole image"
            return Choice(None, (note,))
        notes: tuple[str, ...] = ()
        if others:
            place = describe_place(chosen[0].left, chosen[0].top, chosen[0].width)
            on = "the face that is" if len(chosen) == 1 else f"{len(chosen)} of them, of which the nearest is"
            notes = (f"{len(others) + len(chosen)} faces found; the identity acts on {on} {place}",)
        return Choice(Selection(*size, tuple(chosen), tuple(others)), notes)


def _areas(faces: Sequence[Face], scale: float) -> list[Area]:
    """Return the rectangles of faces in the pixels of an image that was reduced by `scale`."""
    return [Area(*(n / scale for n in (face.left, face.top, face.side, face.side))) for face in faces]


def _faces(pixels: Pixels) -> list[Face]:
    """Find all faces at one size, because small faces beside a large one must be found too."""
    return [Face(*box, embed_box(pixels, box)) for box in find_boxes(pixels, sides=(SEARCHED,))]


def _check_inside(area: Area, source: Rows) -> None:
    numbers = all(map(is_finite, area))
    inside = numbers and 0 <= area.left < source.width and 0 <= area.top < source.height
    if not inside or not 0 < area.width <= LARGEST_SIDE or not 0 < area.height <= LARGEST_SIDE:
        shown = ",".join(f"{n!s:.20}" for n in area)
        raise SettingError(
            f"rectangle {shown}: expected left, top, width and height inside the image of {source.width} x "
            f"{source.height} pixels",
            setting="apply_to",
        )
