"""Image formats: the formats that are read and written, their file suffixes, and their largest sides."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import features

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.extras import install

SAVE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Suffix of each supported output format -> Pillow's format name."""

# Other formats that Pillow reads are rarely photographs and often unsafe: EPS starts Ghostscript.
_ALWAYS_READ = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
_OPTIONAL = {"JPEG2000": ("jpg_2000", (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc")), "AVIF": ("avif", (".avif",))}
"""Format -> Pillow's feature, which not every build has, and suffixes."""
_HEIF = (".heic", ".heif", ".hif")
_UNREAD = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".gpr", ".iiq", ".kdc", ".mef", ".mos", ".mrw"),
    *(".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw", ".x3f"),
    *(".bpg", ".cur", ".dcx", ".dds", ".eps", ".exr", ".fit", ".fits", ".hdr", ".icb", ".icns", ".ico", ".jls", ".jps"),
    *(".jxl", ".jxr", ".pcd", ".pct", ".pcx", ".pict", ".pns", ".psb", ".psd", ".qoi", ".ras", ".sgi", ".svg", ".tga"),
    *(".wdp", ".xbm", ".xcf", ".xpm"),
)
"""Suffixes of raw photographs and of other images that are not read."""

_MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383}
"""Largest side of the formats in pixels."""


_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\x00", b"MM\x00*")
"""First bytes of JPEG, PNG, GIF and TIFF files."""


@lru_cache(maxsize=1)
def readable() -> dict[str, tuple[str, ...]]:
    """Return {Pillow's format name: lower-case suffixes} of the formats that are read on this machine.

    HEIC needs the `heif` extra. JPEG 2000 and AVIF need a build of Pillow with their decoders.
    """
    found = dict(_ALWAYS_READ)
    found |= {kind: suffixes for kind, (feature, suffixes) in _OPTIONAL.items() if features.check(feature)}
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
        found["HEIF"] = _HEIF
    return found


def image_suffixes() -> tuple[str, ...]:
    """Return the lower-case suffixes of the image files that a folder search finds."""
    return tuple(suffix for suffixes in readable().values() for suffix in suffixes)


def format_names() -> str:
    """Return the names of the formats that are read, for messages."""
    return ", ".join(kind for kind in readable() if kind != "DIB")


def is_unread_image(path: Path) -> bool:
    """Whether the suffix is a suffix of images that are not read on this machine."""
    known = {*_UNREAD, *_HEIF, *(suffix for _, suffixes in _OPTIONAL.values() for suffix in suffixes)}
    return path.suffix.lower() in known - set(image_suffixes())


def begins_as_image(path: Path) -> bool:
    """Whether a file begins as an image of a common format does."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(_SIGNATURES) or head[8:12] == b"WEBP"


def describe_unread(paths: Sequence[Path]) -> str:
    """Return a note that names image files that were passed over, at most three of them, and what to do."""
    heif = any(path.suffix.lower() in _HEIF for path in paths)
    advice = f"to read HEIC: {install('heif')}" if heif else "convert them to JPEG or PNG"
    return f"{len(paths)} image(s) of formats that are not read were passed over: {some_names(paths)}; {advice}"


def some_names(paths: Sequence[Path]) -> str:
    """Return the names of at most three files, and the number of the others."""
    return ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def is_heif(head: bytes) -> bool:
    """Whether the first 12 bytes of a file are the header of a HEIC image (ISO/IEC 23008-12)."""
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def check_side(kind: str, width: int, height: int) -> None:
    """Raise `PFStorerError` if images of this size cannot be written in a format. kind: Pillow's format name."""
    largest = _MAX_SIDE.get(kind)
    if largest and max(width, height) > largest:
        size = f"{width} x {height}"
        raise PFStorerError(f"{size} is too large for {kind}, at most {largest} a side; use png or tif")
