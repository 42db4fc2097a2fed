"""Image files to arrays and back: orientation, colour profiles, depth, alpha; resizing.

Arrays are (H, W, 3) float32 in [0, 1], sRGB. Tensors are (B, 3, H, W) in [-1, 1], the range of the networks.
Only the functions that use tensors import torch, so that commands without tensors start faster.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pfstorer_rt.errors import BadFileError, PFStorerError, SettingError, one_line
from pfstorer_rt.extras import install
from pfstorer_rt.files import atomic_write, exists_already, open_plain, show_path
from pfstorer_rt.imaging.formats import SAVE_FORMATS, check_side, format_names, is_heif, readable
from pfstorer_rt.imaging.metadata import Metadata, orientation, read_metadata, save_options, without_pillow_limit
from pfstorer_rt.imaging.profiles import srgb_profile, to_srgb, wide_to_srgb
from pfstorer_rt.imaging.rows import TALL, Pixels, Rows, Spool, bands, from_pixels, read_ahead, read_pixels, to_pixels

if TYPE_CHECKING:
    import torch


LARGEST_STREAM = 1 << 30
"""Bytes that are read from a stream, which may have no end."""
MAX_PIXELS = 200_000_000
"""Default limit on the pixels of an input image and of a result."""

_NO_METADATA = Metadata()
_DEEP = "more than 8 bits a channel: results have 8"
_MISSING = 0.1
"""Largest share of missing rows with which a JPEG is read."""
_JPEG_END = b"\xff\xd9"  # marker EOI
# Preserve restored detail: no chroma subsampling, and keep colours under transparent alpha. TIFF stays uncompressed:
# the compressed writer of Pillow fails on the EXIF directory of the camera.
_QUALITY: dict[str, dict[str, Any]] = {"JPEG": {"subsampling": 0}, "WEBP": {"exact": True}}


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded image file, upright and in sRGB."""

    pixels: Pixels
    """(H, W, 3) float32 in [0, 1]."""
    alpha: Pixels | None = None
    """(H, W) float32 in [0, 1]; None if the file has no transparency."""
    metadata: Metadata = _NO_METADATA
    """Metadata to embed in the saved file."""
    frames: int = 1
    """Number of frames or pages in the file; only the first is decoded."""
    notes: tuple[str, ...] = ()
    """Warnings about the conversion, for the user."""


@dataclass(frozen=True, eq=False)
class Scan:
    """A `DecodedImage` that is read by rows; a large one is stored in a temporary file."""

    pixels: Spool
    alpha: Spool | None = None
    """One channel: 1 is opaque, -1 is transparent."""
    metadata: Metadata = _NO_METADATA
    frames: int = 1
    notes: tuple[str, ...] = ()


def load_image(source: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Read the first frame of an image file or binary stream into memory; conversions as in `scan_image`."""
    scan = scan_image(source, max_pixels)
    height = scan.pixels.height
    alpha = None if scan.alpha is None else scan.alpha.pixels(0, height)[..., 0]
    return DecodedImage(scan.pixels.pixels(0, height), alpha, scan.metadata, scan.frames, scan.notes)


def scan_image(source: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> Scan:
    """Read the first frame of an image file or binary stream, for access by rows.

    Decoding needs 4 bytes of memory per pixel, because Pillow decodes whole images. Afterwards a large image needs no
    memory: it is stored in a temporary file.

    Applies the EXIF orientation and converts from the embedded colour profile to sRGB with perceptual
    intent. 16-bit grey keeps its depth; 16-bit colour is reduced to 8 bits. A JPEG without its last bytes is read, with
    a note, if at most a tenth of its rows is missing; these rows are grey.
    max_pixels: limit on width x height, checked before decoding.
    Raises BadFileError if the source is missing, empty, damaged, not an image, or too large.
    """
    with _open(source) as (handle, name):
        image = _identify(handle, name)
        _check_pixels(*image.size, name, max_pixels)
        width, height = image.size
        notes: list[str] = []
        try:
            return _decode(_load(image, handle, notes), name, notes)
        except PFStorerError:
            raise
        except MemoryError as error:
            raise BadFileError(f"{name}: too little memory for {width} x {height}; shrink it") from error
        except Exception as error:  # Pillow's decoders raise many exception types on damaged data
            message = f"{name}: cannot be decoded ({one_line(error)}); cut off or damaged: copy it again"
            raise BadFileError(message) from error


def image_size(source: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (height, width) of an image file in its EXIF orientation, without decoding; raises as `scan_image`."""
    with _open(source) as (handle, name):
        image = _identify(handle, name)
        _check_pixels(*image.size, name, max_pixels)
        width, height = image.size
        if image.format == "TIFF":  # some versions of Pillow swap them at once, as `load` does
            width, height = (cast(Any, image).tag_v2[tag] for tag in (256, 257))
        return (height, width) if orientation(image) < 5 else (width, height)


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadFileError(
            f"{name}: {width} x {height} is {width * height} pixels; expected at most {max_pixels}; "
            "make the image smaller or raise the limit",
            setting="max_pixels",
        )


def save_image(
    path: str | os.PathLike[str],
    pixels: npt.NDArray[np.floating[Any]] | Rows,
    *,
    alpha: npt.NDArray[np.floating[Any]] | Rows | None = None,
    metadata: Metadata = _NO_METADATA,
    quality: int = 95,
    overwrite: bool = False,
) -> None:
    """Write an image atomically, in the format given by the suffix of the path.

    Arguments as for `encode_image`.
    Raises ExistsError if the file exists and `overwrite` is False, and PFStorerError if the suffix is unknown, a pixel
    is not finite, the format does not support the size, or the write fails.
    """
    name, suffix = show_path(path), Path(path).suffix.lower()
    if suffix not in SAVE_FORMATS:
        known = " ".join(SAVE_FORMATS)
        raise PFStorerError(f"{name}: cannot write {suffix or 'a name without a suffix'}; use one of {known}")
    if not overwrite and os.path.lexists(path) and not os.path.isdir(path):
        raise exists_already(path)
    with atomic_write(path, overwrite=overwrite) as handle:
        try:
            _encode(cast(BinaryIO, _Sink(handle)), SAVE_FORMATS[suffix], pixels, alpha, metadata, quality)
        except PFStorerError as error:
            raise PFStorerError(f"{name}: {error}") from error


def encode_image(
    pixels: npt.NDArray[np.floating[Any]] | Rows,
    format: str = "png",
    *,
    alpha: npt.NDArray[np.floating[Any]] | Rows | None = None,
    metadata: Metadata = _NO_METADATA,
    quality: int = 95,
) -> bytes:
    """Encode an image with 8 bits per channel. The same arguments give the same bytes.

    pixels: (H, W, 3) float, or `Rows`, clamped to [0, 1]. format: a key of `SAVE_FORMATS`, with or without the dot.
    alpha: (H, W) float in [0, 1]. JPEG and BMP do not support alpha, so the image is composited over white.
    metadata: embedded as far as the format supports it (`metadata.save_options`; JPEG supports 64 KB of each kind).
    quality: 1 to 100, for JPEG and lossy WebP.
    Raises PFStorerError if a value is NaN or infinite or the format does not support the size, and
    ValueError for another shape, type, format or quality.
    """
    kind = SAVE_FORMATS.get("." + format.lower().lstrip("."))
    if kind is None or not 1 <= quality <= 100:
        known = ", ".join(suffix[1:] for suffix in SAVE_FORMATS)
        raise SettingError(f"format {format!r} at quality {quality}; expected one of {known}, and 1 to 100")
    buffer = io.BytesIO()
    _encode(buffer, kind, pixels, alpha, metadata, quality)
    return buffer.getvalue()


class _Sink:
    """A file without a descriptor. Pillow then uses `write`, which preserves the errno of a full disk."""

    def __init__(self, handle: BinaryIO) -> None:
        self.write, self.seek, self.tell, self.flush = handle.write, handle.seek, handle.tell, handle.flush


def _encode(sink: BinaryIO, kind: str, pixels: Any, alpha: Any, metadata: Metadata, quality: int) -> None:
    image = _to_pillow(pixels, alpha, kind)
    try:
        image.save(sink, kind, quality=quality, **_QUALITY.get(kind, {}), **save_options(kind, metadata))
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno:  # an error of the disk, not of the encoder
            raise
        raise PFStorerError(f"{kind} cannot hold this image ({one_line(error)}); use png") from error


def to_tensor(pixels: Pixels) -> torch.Tensor:
    """Convert (H, W, 3) float in [0, 1] to a (1, 3, H, W) float32 tensor in [-1, 1]."""
    import torch

    return torch.from_numpy(from_pixels(pixels)[None])


def from_tensor(tensor: torch.Tensor) -> Pixels:
    """Convert a (1, 3, H, W) tensor in [-1, 1] to (H, W, 3) float32, clamped to [0, 1].

    NaN stays NaN, and `save_image` rejects it. Raises ValueError for another shape.
    """
    if tensor.ndim != 4 or tensor.shape[:2] != (1, 3):
        raise ValueError(f"tensor of shape {tuple(tensor.shape)}; expected (1, 3, H, W)")
    return to_pixels(tensor[0].detach().float().cpu().numpy())


def resize_bicubic(tensor: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """Resize (B, 3, H, W) in [-1, 1] to (h, w) pixels and clamp the overshoot.

    antialias: apply a low-pass filter; use True to shrink. StableSR enlarges without it.
    """
    import torch.nn.functional as F

    wide = F.interpolate(tensor.float(), size=size, mode="bicubic", align_corners=False, antialias=antialias)
    return wide.clamp(-1, 1).to(tensor.dtype)


@contextlib.contextmanager
def _open(source: str | os.PathLike[str] | BinaryIO) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a seekable, non-empty stream and its name in messages."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            name = show_path(source)
            handle: BinaryIO = stack.enter_context(_open_path(source, name))
        else:
            handle, name = source, str(getattr(source, "name", "the input stream"))
        try:
            if not handle.seekable():
                handle = read_stream(handle, name)
            empty = not handle.read(1)
            handle.seek(0)
        except OSError as error:
            raise BadFileError(f"{name}: cannot be read ({one_line(error)}); check the disk") from error
        if empty:
            raise BadFileError(f"{name}: empty, 0 bytes; expected an image: copy it again")
        yield handle, name


def read_stream(handle: BinaryIO, name: str = "the input stream") -> io.BytesIO:
    """Read a stream to its end; raises `BadFileError` for more than `LARGEST_STREAM` bytes."""
    data = bytearray()
    while part := handle.read(1 << 20):
        data += part
        if len(data) > LARGEST_STREAM:
            raise BadFileError(f"{name}: more than {LARGEST_STREAM >> 20} MB; expected an image: save it as a file")
    return io.BytesIO(data)


def _open_path(path: str | os.PathLike[str], name: str) -> BinaryIO:
    try:
        return open_plain(path)
    except FileNotFoundError as error:
        raise BadFileError(f"{name}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise BadFileError(f"{name}: a folder; expected an image file") from error
    except (OSError, ValueError) as error:  # ValueError: the name contains a NUL
        raise BadFileError(f"{name}: cannot be opened ({one_line(error)}); check the path") from error


def _identify(handle: BinaryIO, name: str) -> Image.Image:
    try:
        with without_pillow_limit():
            return Image.open(handle, formats=tuple(readable()))
    except Exception as error:  # many exception types; UnidentifiedImageError is the usual one
        handle.seek(0)
        advice = f"for HEIC: {install('heif')}; or " if is_heif(handle.read(12)) and "HEIF" not in readable() else ""
        # Pillow refuses, for example, a PNG with more than 1 MB of text.
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({one_line(error)})"
        advice = f"{format_names()}; {advice}convert it first, or copy it again"
        message = f"{name}: not a readable image{reason}; expected {advice}"
        raise BadFileError(message) from error


def _load(image: Image.Image, handle: BinaryIO, notes: list[str]) -> Image.Image:
    """Decode the first frame of an image. A JPEG that is cut off gets an end marker, so that libjpeg fills the rest."""
    if (frames := _count_frames(image)) > 1 and image.format != "MPO":  # phones store previews and depth maps in MPO
        notes.append(f"{frames} frames: the first was used")
    if any("16" in _raw_mode(tile[3]) for tile in getattr(image, "tile", ())):  # Pillow reads 16-bit colour as 8-bit
        notes.append(_DEEP)
    try:
        image.load()
        return image
    except OSError as error:
        if image.format not in ("JPEG", "MPO") or "truncated" not in str(error):
            raise
    handle.seek(0)
    completed = _identify(io.BytesIO(handle.read() + _JPEG_END), "JPEG")
    completed.load()
    missing = _grey_rows(completed)
    if missing > completed.height * _MISSING:
        raise OSError(f"{missing} of {completed.height} rows are missing")
    lost = f"; {missing} of {completed.height} rows are missing" if missing else ""
    notes.append(f"cut off at its end: copy it again if a whole file exists{lost}")
    return completed


def _grey_rows(image: Image.Image) -> int:
    """Count the rows at the bottom that libjpeg has filled with middle grey."""
    values = np.asarray(image, np.int16)
    farthest = np.abs(values - 128).reshape(len(values), -1).max(1)
    other = np.flatnonzero(farthest > 1)
    return len(values) - 1 - int(other[-1]) if len(other) else len(values)


def _decode(image: Image.Image, name: str, notes: list[str]) -> Scan:
    profile = image.info.get("icc_profile") or None
    wide = image.mode == "F" or image.mode.startswith("I")
    if wide:
        highest = _check_range(image, name)
        notes.append(_DEEP)
        if highest <= 1 / 16:
            notes.append(f"its brightest value is {highest:.1%} of white: rescale a file with 12-bit values in 16 bits")
    levels, managed = to_srgb("L" if wide else image.mode, image, profile, notes)
    metadata, turn = read_metadata(image, srgb_profile() if managed else None, notes), orientation(image)
    width, height = image.size if turn < 5 else image.size[::-1]
    pixels = Spool(height, width, 3, np.float32 if wide else np.uint8)
    opaque = isinstance(image.info.get("transparency"), int) if wide else image.has_transparency_data
    alpha = Spool(height, width, 1, np.uint8) if opaque else None
    for start, stop in bands(height, width):
        strip = _upright(image, turn, start, stop)
        srgb = wide_to_srgb(strip, levels, _top(image)) * 2 - 1 if wide else levels(strip)
        pixels.write(start, srgb.transpose(2, 0, 1))
        if alpha and wide:
            opacity = np.where(np.asarray(strip) == image.info["transparency"], 0, 255)
            alpha.write(start, opacity[None].astype(np.uint8))
        elif alpha:
            alpha.write(start, np.asarray(strip.convert("RGBA").getchannel("A"))[None])
    return Scan(pixels, alpha, metadata, _count_frames(image), tuple(dict.fromkeys(notes)))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, turn: int, start: int, stop: int) -> Image.Image:
    """Return rows start..stop-1 of the image in its EXIF orientation."""
    length = image.height if turn < 5 else image.width
    first, last = (length - stop, length - start) if turn in (3, 4, 7, 8) else (start, stop)
    with without_pillow_limit():  # Pillow before 13 checks it in `crop` too
        strip = image.crop((0, first, image.width, last) if turn < 5 else (first, 0, last, image.height))
    return strip.transpose(_TURNS[turn]) if turn in _TURNS else strip


def _raw_mode(arguments: Any) -> str:
    """Return the raw mode in the arguments of one of Pillow's decoders, such as RGB;16B; empty without one."""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _count_frames(image: Image.Image) -> int:
    frames = 1
    with contextlib.suppress(Exception):  # a later frame is damaged; the first may be intact
        frames = int(getattr(image, "n_frames", 1))
    image.seek(0)
    return frames


def _check_range(image: Image.Image, name: str) -> float:
    """Return the highest value of a grey image of more than 8 bits; white is 1.

    Raises `BadFileError` for values that do not define black and white.
    """
    top, values = _top(image), np.asarray(image)
    low, high = float(values.min()), float(values.max())  # NaN if any value is NaN
    if not 0 <= low <= high <= top:
        found = f"values from {low:g} to {high:g}"
        raise BadFileError(f"{name}: {found}; expected 0 to {top}: rescale it")
    return high / top


def _top(image: Image.Image) -> int:
    return 1 if image.mode == "F" else 65535


def _to_pillow(pixels: Any, alpha: Any, kind: str) -> Image.Image:
    """Convert arrays or rows to a Pillow image, band by band: 4 bytes of memory per pixel."""
    (height, width), read = _reader(pixels, "pixels (H, W, 3)", 3)
    check_side(kind, width, height)
    size, read_alpha = (None, None) if alpha is None else _reader(alpha, "alpha (H, W)", 1)
    if size not in (None, (height, width)):
        raise ValueError(f"alpha {size}; expected {(height, width)}")
    over_white = read_alpha is not None and kind in ("JPEG", "BMP")
    image = Image.new("RGBA" if read_alpha and not over_white else "RGB", (width, height))

    def levels(start: int, stop: int) -> npt.NDArray[np.uint8]:
        band = read(start, stop)
        if read_alpha:
            opacity = read_alpha(start, stop)
            band = band * opacity + (1 - opacity) if over_white else np.concatenate([band, opacity], axis=-1)
        return _to_uint8(band)

    spans = list(bands(height, width, least=TALL))
    for (start, _), band in zip(spans, read_ahead(levels, spans), strict=True):
        image.paste(Image.fromarray(band), (0, start))
    return image


def _reader(given: Any, what: str, channels: int) -> tuple[tuple[int, int], Callable[[int, int], Pixels]]:
    """Return (height, width) of an array or rows, and a function that reads its pixels (n, W, channels)."""
    if not isinstance(given, np.ndarray):
        return (given.height, given.width), partial(read_pixels, given)
    planes = given[..., None] if channels == 1 and given.ndim == 2 else given
    if planes.ndim != 3 or planes.shape[2] != channels or not planes.size or planes.dtype.kind != "f":
        raise ValueError(f"got {given.shape} {given.dtype}; expected {what} float")
    return planes.shape[:2], lambda start, stop: planes[start:stop]


def _to_uint8(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    if not np.isfinite(values).all():
        raise PFStorerError("NaN or infinite values in the image; use fp32")
    return np.floor(values.clip(0, 1) * 255 + 0.5).astype(np.uint8)
