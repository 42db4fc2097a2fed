"""Metadata of images: what a result keeps of its input, and the mark that an image was made with AI.

EXIF, XMP, IPTC and the resolution are kept. The mark is the property DigitalSourceType of the IPTC Photo Metadata
Standard, in XMP.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pfstorer_rt.files import open_plain
from pfstorer_rt.imaging.formats import readable

_limit_lock = threading.Lock()

ORIENTATION = 0x0112
_XMP, _IPTC = 700, 33723
"""Tags of XMP and IPTC in the first directory of a TIFF file."""
_X_RESOLUTION, _Y_RESOLUTION, _UNIT = 0x011A, 0x011B, 0x0128
_INCH = 2
# Tags about the photograph. The other tags of a TIFF's first directory describe its strips.
_KEPT = (*(0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298), *range(0x9C9B, 0x9CA0))
_DIRECTORIES = (0x8769, 0x8825)  # camera and GPS
_STALE = (0xA001, 0xA002, 0xA003, 0xA005)  # colour space, width, height, interoperability
_PHOTOSHOP_IPTC = 0x0404
_PNG_IPTC = "Raw profile type iptc"

_SEGMENT = 65_533  # bytes of a JPEG segment without its length field
_LONGEST = 1 << 20  # bytes of XMP that are kept

AI_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's value for a photograph that was edited with a generative network."""
_SYSTEM = "pfstorer-rt"
_MARK = (
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{AI_SOURCE}" Iptc4xmpExt:AISystemUsed="{_SYSTEM}"/>'
)
_END = "</rdf:RDF>"
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{_END}</x:xmpmeta><?xpacket end="w"?>'
)
_SOURCE_TYPE = re.compile(
    r'\s[\w-]+:DigitalSourceType\s*=\s*("[^"]*"|\'[^\']*\')'
    r"|<([\w-]+:DigitalSourceType)\b(?:[^<>]*/>|[^<>]*>[^<]*</\2>)"
)
"""The property, as an attribute or an element. An element ends before the next `<`, so that the search for a million
unfinished ones takes no hours."""
_TURNED = re.compile(r"(\btiff:Orientation(?:>|\s*=\s*[\"'])\s*)\d+")


@dataclass(frozen=True)
class Metadata:
    """Metadata of an image, as it is embedded in a saved file; None for what the image does not have."""

    icc: bytes | None = None
    """sRGB profile; None if the source had no usable profile."""
    exif: bytes | None = None
    """EXIF data with orientation 1, without a resolution."""
    xmp: bytes | None = None
    """XMP packet in UTF-8."""
    iptc: bytes | None = None
    """IPTC-IIM records."""
    dpi: tuple[float, float] | None = None
    """Horizontal and vertical resolution in pixels per inch."""

    def scaled(self, x: float, y: float) -> Metadata:
        """Return the metadata of an image that has x times the columns and y times the rows."""
        return replace(self, dpi=(self.dpi[0] * x, self.dpi[1] * y)) if self.dpi else self

    def marked(self) -> Metadata:
        """Return the metadata with the mark that the image was made with AI, which replaces an earlier mark."""
        text = self.xmp.decode() if self.xmp else _PACKET
        text = _SOURCE_TYPE.sub("", text.replace(_MARK, ""))
        return replace(self, xmp=(_MARK + _END).join(text.rsplit(_END, 1)).encode())


def read_metadata(image: Image.Image, icc: bytes | None, notes: list[str]) -> Metadata:
    """Return the metadata of a loaded image as they apply to the upright image.

    icc: profile to embed. notes: receives a line for metadata that cannot be read.
    """
    exif = _clean_exif(image, notes)
    dpi = _dpi(image)
    if dpi and orientation(image) >= 5:
        dpi = dpi[::-1]
    return Metadata(icc, exif, _clean_xmp(image.info.get("xmp"), notes), _iptc(image), dpi)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the image has none or an invalid one."""
    turn: Any = None
    with contextlib.suppress(Exception):  # _clean_exif adds a note about unreadable EXIF
        turn = image.getexif().get(ORIENTATION)
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


@contextlib.contextmanager
def without_pillow_limit() -> Iterator[None]:
    """Open and crop images above Pillow's limit, a global below `max_pixels`, which is checked after opening."""
    with _limit_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def is_marked(path: str | os.PathLike[str]) -> bool:
    """Whether an image file is a result of this program, by its mark; False for a file that cannot be read."""
    with (
        contextlib.suppress(Exception),
        without_pillow_limit(),
        open_plain(path) as file,  # `open` waits for ever at a pipe
        Image.open(file, formats=tuple(readable())) as image,
    ):
        return f'AISystemUsed="{_SYSTEM}"'.encode() in (image.info.get("xmp") or b"")
    return False


def save_options(kind: str, metadata: Metadata) -> dict[str, Any]:
    """Return the arguments of Pillow's `save` that embed the metadata which the format supports.

    kind: Pillow's format name. BMP has only a resolution. WebP has no IPTC, and its resolution is in EXIF.
    """
    exif = _exif_with_dpi(metadata)
    writers: dict[str, Callable[[Metadata, Image.Exif | None], dict[str, Any]]] = {
        "JPEG": _jpeg,
        "PNG": _png,
        "WEBP": _webp,
        "TIFF": _tiff,
    }
    options = writers[kind](metadata, exif) if kind in writers else {}
    if metadata.icc and kind != "BMP":
        options["icc_profile"] = metadata.icc
    if metadata.dpi and kind != "WEBP" and max(metadata.dpi) <= 65_535:  # JPEG stores 16 bits
        options["dpi"] = metadata.dpi
    return options


def _jpeg(metadata: Metadata, exif: Image.Exif | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if exif and len(written := exif.tobytes()) <= _SEGMENT:
        options["exif"] = written
    if metadata.xmp and len(metadata.xmp) <= _SEGMENT - 29:  # 29: the name of the segment
        options["xmp"] = metadata.xmp
    elif metadata.xmp and _MARK.encode() in metadata.xmp:
        options["xmp"] = Metadata().marked().xmp
    segment = b"Photoshop 3.0\0" + _photoshop(metadata.iptc) if metadata.iptc else b""
    if 0 < len(segment) <= _SEGMENT:
        options["extra"] = b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment
    return options


def _png(metadata: Metadata, exif: Image.Exif | None) -> dict[str, Any]:
    text = PngInfo()
    if metadata.xmp:
        text.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode())
    if metadata.iptc:  # ImageMagick's form, which other programs read too
        block = _photoshop(metadata.iptc)
        text.add_text(_PNG_IPTC, f"\niptc\n{len(block):8}\n{block.hex()}\n", zip=True)
    return {"pnginfo": text, **({"exif": exif.tobytes()} if exif else {})}


def _webp(metadata: Metadata, exif: Image.Exif | None) -> dict[str, Any]:
    return {**({"exif": exif.tobytes()} if exif else {}), **({"xmp": metadata.xmp} if metadata.xmp else {})}


def _tiff(metadata: Metadata, exif: Image.Exif | None) -> dict[str, Any]:
    exif = exif or Image.Exif()
    for tag, value in ((_XMP, metadata.xmp), (_IPTC, metadata.iptc)):
        if value:
            exif[tag] = value
    return {"exif": exif} if len(exif) else {}


def _exif_with_dpi(metadata: Metadata) -> Image.Exif | None:
    if not metadata.exif and not metadata.dpi:
        return None
    exif = Image.Exif()
    if metadata.exif:
        exif.load(metadata.exif)
        for directory in _DIRECTORIES:
            if directory in exif:
                exif[directory] = exif.get_ifd(directory)
    if metadata.dpi:
        exif[_X_RESOLUTION], exif[_Y_RESOLUTION] = metadata.dpi
        exif[_UNIT] = _INCH
    return exif


def _photoshop(iptc: bytes) -> bytes:
    """Return an image resource block of Photoshop with IPTC records."""
    return b"8BIM" + struct.pack(">HHI", _PHOTOSHOP_IPTC, 0, len(iptc)) + iptc + b"\0" * (len(iptc) % 2)


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    """Return the resolution that the file states; Pillow invents one for a JPEG with EXIF that has none."""
    with contextlib.suppress(Exception):
        x, y = (float(value) for value in image.info["dpi"])
        stated = image.format != "JPEG" or image.info.get("jfif_unit") in (1, 2) or _X_RESOLUTION in image.getexif()
        if stated and all(math.isfinite(value) and 1 < value <= 65_535 for value in (x, y)):
            return x, y
    return None


def _iptc(image: Image.Image) -> bytes | None:
    found: Any = None
    with contextlib.suppress(Exception):
        if "photoshop" in image.info:
            found = image.info["photoshop"].get(_PHOTOSHOP_IPTC)
        elif _PNG_IPTC in image.info:
            _, size, *digits = str(image.info[_PNG_IPTC]).split()
            block = bytes.fromhex("".join(digits))[: int(size)]
            found = block[12 : 12 + struct.unpack(">I", block[8:12])[0]] if block[:4] == b"8BIM" else block
        else:
            found = getattr(image, "tag_v2", {}).get(_IPTC)
    return found if isinstance(found, bytes) and found else None


def _clean_xmp(xmp: Any, notes: list[str]) -> bytes | None:
    """Return an XMP packet with orientation 1; None if it is absent or cannot be completed by the mark."""
    if not xmp:
        return None
    with contextlib.suppress(Exception):
        text = (xmp if isinstance(xmp, bytes) else str(xmp).encode()).rstrip(b"\0").decode()
        if _END in text and len(text) <= _LONGEST and "\0" not in text:
            return _TURNED.sub(r"\g<1>1", text).encode()
    notes.append("XMP unreadable: ignored")
    return None


def _clean_exif(image: Image.Image, notes: list[str]) -> bytes | None:
    try:
        source = image.getexif()
        clean = Image.Exif()
        clean.endian = source.endian
        for tag in _KEPT:
            if tag in source:
                clean[tag] = source[tag]
        for directory in _DIRECTORIES:
            entries = {k: v for k, v in source.get_ifd(directory).items() if k not in _STALE}
            if entries:
                clean.get_ifd(directory).update(entries)
                clean[directory] = clean.get_ifd(directory)
        if not len(clean) and ORIENTATION not in source:
            return None
        clean[ORIENTATION] = 1
        return clean.tobytes()
    except Exception:
        notes.append("EXIF unreadable: ignored")
        return None
