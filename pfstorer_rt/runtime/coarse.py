"""Coarse to fine: an image with a large face is restored at a reduced scale first, and then guides its own tiles.

A tile that shows a cheek or hair alone cannot know what belongs there. The coarse pass sees the face in one tile. Its
result replaces the low frequencies of the image that the fine pass restores; all frequencies above the limit of the
coarse image stay unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pfstorer_rt.faces.dlib import INSTALL_METRICS, face_models
from pfstorer_rt.faces.finding import find_largest, reduced
from pfstorer_rt.imaging.bands import Canvas, Resized
from pfstorer_rt.imaging.rows import TALL, Band, Rows, Spool, bands, read_ahead, spooled_bytes
from pfstorer_rt.runtime.layout import Layout
from pfstorer_rt.runtime.part import base_layout, find_parts
from pfstorer_rt.runtime.selection import Choice as FaceChoice
from pfstorer_rt.runtime.selection import Selection

LARGEST_FACE = 0.8
"""Largest side of a face, relative to a tile, that is restored without a coarse pass."""
LARGEST_RATIO = 0.65
"""Largest ratio of the two scales. The coarse pass then has at most 0.42 times the pixels of the fine pass."""
SMALLEST_RATIO = 0.25
"""Smallest ratio of the two scales that was measured; a larger face gives a note."""
ASSUMED_FACE = 0.4
"""Assumed side of the largest face, relative to the shorter side of the image, when no face is known."""
CAUTIOUS_RATIO = 0.5
"""Smallest ratio for an assumed face, because small faces may not survive a larger reduction."""


@dataclass(frozen=True)
class Passes:
    """The passes of a restoration."""

    fine: Layout
    coarse: Layout | None = None
    """Layout of the pass at the reduced scale; None restores in one pass."""
    notes: tuple[str, ...] = ()
    """Notes for the user on the choice of the scale and of the faces."""
    selection: Selection | None = None
    """The faces on which the identity acts; None is the whole image."""
    limit: float | None = None
    """Largest side in pixels of a face in the image that one pass restores; None if no larger face was found."""

    @property
    def last(self) -> Layout:
        """Return the layout of the last pass: without the identity, if the person's face is larger than the limit.

        Such a face has its likeness from the coarse pass. A tile of the last pass shows a part of the face, on which
        the identity leaves a woven pattern.
        """
        faces = self.selection.chosen if self.selection else ()
        if self.limit is None or any(min(face.width, face.height) <= self.limit for face in faces):
            return self.fine
        return base_layout(self.fine)

    def chosen(self, choice: FaceChoice) -> Passes:
        """Return the passes with the identity limited to the chosen faces."""
        return replace(self, selection=choice.selection, notes=(*self.notes, *choice.notes))

    def layouts(self) -> list[Layout]:
        """Return the layouts of all passes, and of the parts that are restored with the identity too."""
        whole = [self.fine, *([self.coarse] if self.coarse else [])]
        if self.selection is None:
            return whole
        return whole + [part.layout for layout in whole for part in find_parts(layout, self.selection)]

    @property
    def total(self) -> int:
        """Tiles through all networks and steps."""
        return sum(layout.total for layout in self.layouts())

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the temporary files of all passes, and of the corrections by the coarse result (`Guided`)."""
        coarse = self.coarse.canvas if self.coarse else None
        correction = spooled_bytes(coarse.out_height, coarse.out_width) if coarse else 0
        return sum(layout.temporary_bytes for layout in self.layouts()) + correction * (2 if self.selection else 1)

    def facts(self) -> dict[str, Any]:
        """Return the entries of a report: as of the fine layout, with the tiles of all passes."""
        facts, layouts = self.fine.facts(), self.layouts()
        facts["tiles"] = sum(layout.denoiser_tiles for layout in layouts)
        facts["codec_tiles"] = sum(layout.codec_tiles for layout in layouts)
        return {**facts, "coarse_scale": round(self.coarse.recipe.scale, 3)} if self.coarse else facts


@dataclass(frozen=True)
class Choice:
    """The scale of the coarse pass, relative to the input image, or None; and notes for the user."""

    scale: float | None = None
    notes: tuple[str, ...] = ()
    limit: float | None = None
    """As in `Passes`."""


def may_be_coarse(layout: Layout, tile: int) -> bool:
    """Whether the content of the image decides on a coarse pass; a coarse image must have at least one tile.

    Mode `auto` never applies in parity mode, which reproduces StableSR.
    """
    recipe, canvas = layout.recipe, layout.canvas
    chosen = recipe.coarse == "on" or (recipe.coarse == "auto" and recipe.mode == "fast")
    return chosen and tile <= LARGEST_RATIO * min(canvas.height, canvas.width)


def choose_scale(source: Rows, layout: Layout, tile: int) -> Choice:
    """Choose the scale of the coarse pass from the largest face of an image, or from its size if no face is known."""
    if not may_be_coarse(layout, tile):
        return Choice()
    finder, forced = face_models() is not None, layout.recipe.coarse == "on"
    face = largest_face(source) if finder else None
    enlargement = layout.canvas.height / source.height
    if face is not None:
        side, least = face * enlargement, 0.0
    else:
        side, least = ASSUMED_FACE * min(layout.canvas.height, layout.canvas.width), CAUTIOUS_RATIO
    if not forced and (side <= LARGEST_FACE * tile or (face is None and finder)):
        return Choice()
    ratio = max(coarse_ratio(side, layout, tile), least)
    limit = LARGEST_FACE * tile / enlargement
    notes = tuple(notes_on(face, side, tile, finder))
    return Choice(ratio * enlargement, notes, limit if face is not None and face > limit else None)


def coarse_ratio(side: float, layout: Layout, tile: int) -> float:
    """Return the scale of the coarse pass relative to the canvas, for a face of `side` pixels on the canvas."""
    least = tile / min(layout.canvas.height, layout.canvas.width)
    return max(min(LARGEST_FACE * tile / side, LARGEST_RATIO), least)


def notes_on(face: float | None, side: float, tile: int, finder: bool) -> Iterator[str]:
    """Yield notes for the user on the choice of the scale; `side` is the size of the face on the canvas."""
    if not finder:
        yield f"the size of faces was estimated from the size of the image; to find faces, {INSTALL_METRICS}"
    most = LARGEST_FACE * tile / SMALLEST_RATIO
    if side > most:
        about = "a face of" if face is not None else "a portrait with a face of"
        yield (
            f"{about} about {side:.0f} pixels is larger than the {most:.0f} pixels that this engine restores well; "
            "use a smaller scale"
        )


def largest_face(source: Rows) -> float | None:
    """Return the side in pixels of the largest face of an image, None without a face."""
    pixels, scale = reduced(source)
    face = find_largest(pixels)
    return None if face is None else face.side / scale


class Guided:
    """An image whose low frequencies are those of a coarse result.

    The image plus the enlarged difference of the coarse result and the reduced input. An image whose coarse result
    equals its reduced input is unchanged.
    """

    def __init__(self, image: Rows, coarse: Rows, reduced: Rows) -> None:
        """coarse, reduced: images of one size, which are read once."""
        self.image, self.height, self.width = image, image.height, image.width
        half = Spool(coarse.height, coarse.width)  # `Resized` clamps to [-1, 1], and differences reach 2
        spans = list(bands(coarse.height, coarse.width, least=TALL))
        differences = read_ahead(lambda *span: (coarse.read(*span) - reduced.read(*span)) / 2, spans)
        for (start, _), band in zip(spans, differences, strict=True):
            half.write(start, band)
        self.correction = Resized(half, self.height, self.width, antialias=False)

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        return (self.image.read(start, stop) + 2 * self.correction.read(start, stop)).clip(-1, 1)


def on_canvas(source: Rows, canvas: Canvas) -> Resized:
    """Resize an image to the size of a canvas without its padding."""
    return Resized(source, canvas.height, canvas.width, canvas.height < source.height)


def reduced_to(source: Rows, canvas: Canvas) -> Resized:
    """Resize an image to the size of the result of a canvas."""
    return Resized(source, canvas.out_height, canvas.out_width, canvas.out_height < source.height)
