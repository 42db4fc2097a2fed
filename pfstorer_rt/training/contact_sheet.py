"""One image of all reference photographs: the used ones as they are cropped, the left-out ones in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pfstorer_rt.errors import SettingError
from pfstorer_rt.faces.dlib import to_uint8
from pfstorer_rt.files import real_path, show_path
from pfstorer_rt.imaging.files import save_image
from pfstorer_rt.imaging.formats import SAVE_FORMATS
from pfstorer_rt.training.framing import Reference

COLUMNS = 5
SIDE = 240
"""Largest side of a photograph on the sheet, in pixels."""
LINES = 8
"""Lines of text below a photograph."""
LINE = 15
"""Height of a line, in pixels."""
LETTERS = 34
"""Characters in a line."""
GAP = 10
"""White pixels between neighbours."""


def check_place(path: Path, photographs: Sequence[Path]) -> None:
    """Raise `SettingError` for a sheet that cannot be written, before the photographs are read.

    In a folder of photographs, it would become a photograph of the next run.
    """
    if path.suffix.lower() not in SAVE_FORMATS:
        found, known = path.suffix or "no suffix", " ".join(SAVE_FORMATS)
        raise SettingError(f"{show_path(path)}: {found}; expected one of {known}", setting="contact_sheet")
    if real_path(path).parent in {real_path(photograph).parent for photograph in photographs}:
        raise SettingError(
            f"{show_path(path)}: this folder contains reference photographs; expected another folder for the sheet",
            setting="contact_sheet",
        )


def save_contact_sheet(path: Path, references: Sequence[Reference]) -> None:
    """Write the sheet of the photographs, with file names and reasons; an existing file is replaced.

    Raises `PFStorerError` if the file cannot be written.
    """
    save_image(path, np.asarray(draw_contact_sheet(references), np.float32) / 255, overwrite=True)


def draw_contact_sheet(references: Sequence[Reference]) -> Image.Image:
    """Return the sheet: rows of at most `COLUMNS` photographs, with file names and reasons below them."""
    columns, rows = min(COLUMNS, len(references)), -(-len(references) // COLUMNS)
    width, height = SIDE + GAP, SIDE + LINES * LINE + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    for i, reference in enumerate(references):
        left, top = GAP + i % COLUMNS * width, GAP + i // COLUMNS * height
        sheet.paste(_thumbnail(reference), (left, top))
        draw.multiline_text((left, top + SIDE + 2), _caption(reference), "black", font)
    return sheet


def _thumbnail(reference: Reference) -> Image.Image:
    """Return the photograph, in light grey if it is left out."""
    pixels = to_uint8(reference.photo.permute(1, 2, 0).numpy())
    image = ImageOps.contain(Image.fromarray(pixels), (SIDE, SIDE))
    if reference.left_out:
        image = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.5)
    return image


def _caption(reference: Reference) -> str:
    status = f"left out: {reference.left_out}" if reference.left_out else "used"
    return "\n".join([*wrap(reference.path.name, LETTERS)[:2], *wrap(status, LETTERS)][:LINES])
