"""Image files to arrays and back: orientation, colour profiles, depth, alpha; resizing.

Arrays are (H, W, 3) float32 in [0, 1], sRGB. Tensors are (B, 3, H, W) in [-1, 1], which the networks
take; torch is imported by the functions that work on tensors, so that the rest starts without it.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps

from pfstorer_rt.errors import BadFileError, PFStorerError
from pfstorer_rt.files import atomic_write, show_path

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.float32]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
"""Suffixes, in lower case, that a folder of pictures is searched for."""

SAVE_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Suffixes that can be written, and Pillow's name of each format."""

MAX_PIXELS = 200_000_000

# Pillow's other readers are rarely photographs and often risky: EPS, for one, starts Ghostscript.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM")
_READ_NAMES = "PNG, JPEG, WebP, TIFF, BMP, GIF or PPM"

_MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # limits of the formats, in pixels
_JPEG_EXIF_MAX = 65_533  # one segment, less its length field

_EXIF_ORIENTATION = 0x0112
# What a photographer wrote. The rest of a TIFF's first directory describes its strips, not the picture.
_EXIF_KEPT = (
    *(0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x8298),
    *range(0x9C9B, 0x9CA0),
)
_EXIF_DIRECTORIES = (0x8769, 0x8825)  # the camera's and the position's
_EXIF_STALE = (0xA001, 0xA002, 0xA003, 0xA005)  # colour space, width, height, interoperability

_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
_guard_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Picture:
    """What was read from an image file, upright and in sRGB."""

    pixels: Pixels
    """(H, W, 3) float32 in [0, 1]."""
    alpha: Pixels | None = None
    """(H, W) float32 in [0, 1]; None where the file has no transparency."""
    icc: bytes | None = None
    """An sRGB profile to embed on saving; None where the source had no usable profile."""
    exif: bytes | None = None
    """EXIF to embed on saving, its orientation 1."""
    frames: int = 1
    """Frames or pages of the file; only the first was read."""
    notes: tuple[str, ...] = ()
    """What a user would want to know about the reading."""


def load_image(source: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read the first frame of an image file or of a binary stream.

    Applies the EXIF orientation and converts from the embedded colour profile to sRGB with perceptual
    intent. 16-bit grey keeps its depth; of 16-bit colour, 8 bits are kept.
    max_pixels: limit on width x height, checked before any pixel is decoded.
    Raises BadFileError where the source is missing, empty, damaged, not an image, or too large.
    """
    with _open(source) as (handle, name):
        image = _identify(handle, name)
        width, height = image.size
        if width * height > max_pixels:
            raise BadFileError(
                f"{name}: {width} x {height} is {width * height} pixels; expected at most {max_pixels}; "
                "make the picture smaller or raise --max-pixels"
            )
        try:
            return _decode(image, name)
        except PFStorerError:
            raise
        except MemoryError as error:
            raise BadFileError(f"{name}: too little memory for {width} x {height}; shrink it") from error
        except Exception as error:  # Pillow's decoders raise anything at all on damaged data
            message = f"{name}: cannot be decoded ({_one_line(error)}); cut off or damaged: copy it again"
            raise BadFileError(message) from error


def save_image(
    path: str | os.PathLike[str],
    pixels: npt.NDArray[np.floating[Any]],
    *,
    alpha: npt.NDArray[np.floating[Any]] | None = None,
    icc: bytes | None = None,
    exif: bytes | None = None,
    quality: int = 95,
    overwrite: bool = False,
) -> None:
    """Write a picture in the format that the path's suffix names, whole or not at all.

    The arguments are those of `encode_image`.
    Raises PFStorerError where the suffix is unknown, the file exists and `overwrite` is False, the
    pixels are not finite, the format cannot hold the picture, or the disk refuses it.
    """
    name, suffix = show_path(path), Path(path).suffix.lower()
    if suffix not in SAVE_FORMATS:
        known = " ".join(SAVE_FORMATS)
        raise PFStorerError(f"{name}: cannot write {suffix or 'a name without a suffix'}; use one of {known}")
    if not overwrite and os.path.lexists(path) and not os.path.isdir(path):
        raise PFStorerError(f"{name}: exists already; choose another name or pass --overwrite")
    try:
        data = encode_image(pixels, suffix, alpha=alpha, icc=icc, exif=exif, quality=quality)
    except PFStorerError as error:
        raise PFStorerError(f"{name}: {error}") from error
    with atomic_write(path) as handle:
        handle.write(data)


def encode_image(
    pixels: npt.NDArray[np.floating[Any]],
    format: str = "png",
    *,
    alpha: npt.NDArray[np.floating[Any]] | None = None,
    icc: bytes | None = None,
    exif: bytes | None = None,
    quality: int = 95,
) -> bytes:
    """Encode a picture with 8 bits a channel; the same arguments give the same bytes.

    pixels: (H, W, 3) float, clamped to [0, 1]. format: a key of `SAVE_FORMATS`, with or without its dot.
    alpha: (H, W) float in [0, 1]; JPEG and BMP have none, so there the picture is laid over white.
    icc, exif: embedded where the format takes them (BMP takes neither, JPEG no EXIF above 64 KB).
    quality: 1 to 100, of JPEG and of lossy WebP.
    Raises PFStorerError where a value is NaN or infinite, or the format cannot hold the size, and
    ValueError for another shape, type, format or quality.
    """
    kind = SAVE_FORMATS.get("." + format.lower().lstrip("."))
    if kind is None or not 1 <= quality <= 100:
        known = ", ".join(suffix[1:] for suffix in SAVE_FORMATS)
        raise ValueError(f"format {format!r} at quality {quality}; expected one of {known}, and 1 to 100")
    image = _to_pillow(pixels, alpha, kind)
    if max(image.size) > _MAX_SIDE.get(kind, max(image.size)):
        size = f"{image.width} x {image.height}"
        raise PFStorerError(f"{size} is too large for {kind}, at most {_MAX_SIDE[kind]} a side; use png or tif")
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **_save_options(kind, icc, exif, quality))
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        raise PFStorerError(f"{kind} cannot hold this picture ({_one_line(error)}); use png") from error
    return buffer.getvalue()


def to_tensor(pixels: Pixels) -> torch.Tensor:
    """Turn (H, W, 3) float in [0, 1] into a (1, 3, H, W) float32 tensor in [-1, 1]."""
    import torch

    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)
    return torch.from_numpy(planes * 2 - 1)


def from_tensor(tensor: torch.Tensor) -> Pixels:
    """Turn a (1, 3, H, W) tensor in [-1, 1] into (H, W, 3) float32, clamped to [0, 1].

    NaN stays NaN, for `save_image` to refuse. Raises ValueError for another shape.
    """
    if tensor.ndim != 4 or tensor.shape[:2] != (1, 3):
        raise ValueError(f"tensor of shape {tuple(tensor.shape)}; expected (1, 3, H, W)")
    planes = ((tensor[0].detach().float() + 1) / 2).clamp(0, 1)
    return np.ascontiguousarray(planes.permute(1, 2, 0).cpu().numpy())


def resize_bicubic(tensor: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """Resize (B, 3, H, W) in [-1, 1] to (h, w) pixels and clamp the overshoot.

    antialias: low-pass first; pass True when shrinking. Enlarging without it is StableSR's.
    """
    import torch.nn.functional as F

    wide = F.interpolate(tensor.float(), size=size, mode="bicubic", align_corners=False, antialias=antialias)
    return wide.clamp(-1, 1).to(tensor.dtype)


@contextlib.contextmanager
def _open(source: str | os.PathLike[str] | BinaryIO) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a seekable, non-empty stream and the name that messages give it."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            name = show_path(source)
            handle: BinaryIO = stack.enter_context(_open_path(source, name))
        else:
            handle, name = source, str(getattr(source, "name", "the input stream"))
        try:
            if not handle.seekable():
                handle = io.BytesIO(handle.read())
            empty = not handle.read(1)
            handle.seek(0)
        except OSError as error:
            raise BadFileError(f"{name}: cannot be read ({_one_line(error)}); check the disk") from error
        if empty:
            raise BadFileError(f"{name}: empty, 0 bytes; expected an image: copy it again")
        yield handle, name


def _open_path(path: str | os.PathLike[str], name: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise BadFileError(f"{name}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise BadFileError(f"{name}: a folder; expected an image file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadFileError(f"{name}: cannot be opened ({_one_line(error)}); check the path") from error


def _identify(handle: BinaryIO, name: str) -> Image.Image:
    try:
        with _without_pillow_limit():
            return Image.open(handle, formats=_READ_FORMATS)
    except Exception as error:  # as for the decoders; UnidentifiedImageError is the usual one
        message = f"{name}: not a readable image; expected {_READ_NAMES}: convert it first, or copy it again"
        raise BadFileError(message) from error


@contextlib.contextmanager
def _without_pillow_limit() -> Iterator[None]:
    # Pillow's guard is one global that stops below our limit; ours is checked right after opening.
    with _guard_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode(image: Image.Image, name: str) -> Picture:
    notes: list[str] = []
    frames = _count_frames(image)
    if frames > 1 and image.format != "MPO":  # phones hide previews and depth maps in MPO files
        notes.append(f"{frames} frames: the first was used")
    image.load()
    exif = _clean_exif(image, notes)
    profile = image.info.get("icc_profile") or None
    with contextlib.suppress(Exception):  # _clean_exif has noted that the EXIF is unreadable
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        pixels, alpha, managed = _decode_wide(image, profile, name, notes)
    else:
        alpha = _unit(image.convert("RGBA").getchannel("A")) if image.has_transparency_data else None
        pixels, managed = _to_srgb(image, profile, notes)
    return Picture(pixels, alpha, srgb_profile() if managed else None, exif, frames, tuple(notes))


def _count_frames(image: Image.Image) -> int:
    frames = 1
    with contextlib.suppress(Exception):  # a later frame is damaged; the first may be whole
        frames = int(getattr(image, "n_frames", 1))
    image.seek(0)
    return frames


def _clean_exif(image: Image.Image, notes: list[str]) -> bytes | None:
    try:
        source = image.getexif()
        clean = Image.Exif()
        clean.endian = source.endian
        for tag in _EXIF_KEPT:
            if tag in source:
                clean[tag] = source[tag]
        for directory in _EXIF_DIRECTORIES:
            entries = {k: v for k, v in source.get_ifd(directory).items() if k not in _EXIF_STALE}
            if entries:
                clean.get_ifd(directory).update(entries)
                clean[directory] = clean.get_ifd(directory)
        if not len(clean) and _EXIF_ORIENTATION not in source:
            return None
        clean[_EXIF_ORIENTATION] = 1
        return clean.tobytes()
    except Exception:
        notes.append("EXIF unreadable: ignored")
        return None


def _unit(image: Image.Image) -> Pixels:
    values: Pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return values


def _decode_wide(
    image: Image.Image, profile: bytes | None, name: str, notes: list[str]
) -> tuple[Pixels, Pixels | None, bool]:
    """Read grey of more than 8 bits: pixels, alpha, and whether a colour profile was applied."""
    values = np.asarray(image).astype(np.float64)
    top = 1 if image.mode == "F" else 65535
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        found = f"values from {values.min():g} to {values.max():g}"
        raise BadFileError(f"{name}: {found}; expected 0 to {top}: rescale it")
    clear = image.info.get("transparency")
    alpha = (values != clear).astype(np.float32) if isinstance(clear, int) else None
    # Profiles are applied to 8 bits only, so the depth is kept by interpolating in a converted ramp.
    levels = np.arange(256, dtype=np.uint8)[None]
    ramp, managed = _to_srgb(Image.fromarray(levels), profile, notes)
    grey = values / top * 255
    channels = [np.interp(grey, levels[0], ramp[0, :, c]).astype(np.float32) for c in range(3)]
    return np.stack(channels, axis=-1), alpha, managed


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> tuple[Pixels, bool]:
    """Convert to (H, W, 3) sRGB; True where a colour profile was applied."""
    if profile is not None:
        try:
            return _unit(_apply_profile(image, profile)), True
        except Exception as error:  # lcms, and what a profile that is no profile makes of it
            notes.append(f"colour profile ignored: {_one_line(error)}")
    if image.mode == "CMYK":
        notes.append("CMYK without a usable profile: colours are approximate")
    return _unit(_plain(image, "RGB")), False


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = parsed.profile.xcolor_space.strip()
    mode = _PROFILE_MODES.get(space, "")
    source = {"CMYK": "CMYK", "LAB": "LAB", "1": "L", "LA": "L", "La": "L", "L": "L"}.get(image.mode, "RGB")
    # Grey files with an RGB profile are common and mean what they say; other mixtures do not.
    if mode != source and (mode, source) != ("RGB", "L"):
        raise ValueError(f"it is for {space}, the picture is {image.mode}")
    srgb = ImageCms.createProfile("sRGB")
    # lcms's shortcut is ten levels off in the shadows of grey; for colour it is right, and ten times faster.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(parsed, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags)
    image = _plain(image, mode)
    if mode == "RGB" and _is_identity(transform):
        return image
    return ImageCms.applyTransform(image, transform) or image


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    # sRGB profiles of different makers differ by rounding; converting between them would only add noise.
    axis = np.linspace(0, 255, 18).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(18, -1, 3)
    converted = ImageCms.applyTransform(Image.fromarray(probe), transform)
    return bool(np.abs(np.asarray(converted, dtype=int) - probe.astype(int)).max() <= 1)


def _plain(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")  # Pillow warns on the direct way
    return image if image.mode == mode else image.convert(mode)


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """Make the sRGB profile that saved pictures carry: always the same bytes."""
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    # lcms writes the current time at 24..35 of the header; a fixed one keeps outputs reproducible.
    made[24:36] = b"".join(part.to_bytes(2, "big") for part in (2000, 1, 1, 0, 0, 0))
    return bytes(made)


def _to_pillow(
    pixels: npt.NDArray[np.floating[Any]], alpha: npt.NDArray[np.floating[Any]] | None, kind: str
) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size or pixels.dtype.kind != "f":
        raise ValueError(f"pixels {pixels.shape} {pixels.dtype}; expected (H, W, 3) float")
    if alpha is None:
        return Image.fromarray(_to_uint8(pixels))
    if alpha.shape != pixels.shape[:2]:
        raise ValueError(f"alpha {alpha.shape}; expected {pixels.shape[:2]}")
    opacity = alpha[..., None]
    if kind in ("JPEG", "BMP"):
        return Image.fromarray(_to_uint8(pixels * opacity + (1 - opacity)))
    return Image.fromarray(_to_uint8(np.concatenate([pixels, opacity], axis=-1)))


def _to_uint8(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    if not np.isfinite(values).all():
        raise PFStorerError("NaN or infinite values in the picture; try --precision fp32")
    return np.floor(values.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _save_options(kind: str, icc: bytes | None, exif: bytes | None, quality: int) -> dict[str, Any]:
    # Restored detail is what the user came for: no chroma subsampling, no dropped colours under alpha.
    table: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"quality": quality, "exact": True},
    }  # TIFF stays uncompressed: Pillow's compressed writer fails on the camera's EXIF directory
    options = table.get(kind, {})
    if icc and kind != "BMP":
        options["icc_profile"] = icc
    if exif and kind != "BMP" and not (kind == "JPEG" and len(exif) > _JPEG_EXIF_MAX):
        options["exif"] = exif
    return options


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
