"""Colour profiles: what converts a picture's own colours to sRGB, and the profile that results carry."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from pfstorer_rt.errors import one_line
from pfstorer_rt.imaging.rows import Pixels

_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}

ToSrgb = Callable[[Image.Image], "npt.NDArray[np.uint8]"]
"""Converts a strip to (H, W, 3) sRGB."""


def to_srgb(mode: str, image: Image.Image, profile: bytes | None, notes: list[str]) -> tuple[ToSrgb, bool]:
    """Return what converts strips of an image to sRGB; True where it applies a colour profile."""
    if profile is not None:
        try:
            convert = _profile_converter(mode, profile)
            probe = image.crop((0, 0, 1, 1)) if mode == image.mode else Image.new(mode, (1, 1))
            convert(probe)
            return (lambda strip: np.asarray(convert(strip))), True
        except Exception as error:  # lcms, and what a profile that is no profile makes of it
            notes.append(f"colour profile ignored: {one_line(error)}")
    if mode == "CMYK":
        notes.append("CMYK without a usable profile: colours are approximate")
    return (lambda strip: np.asarray(_plain(strip, "RGB"))), False


def _profile_converter(own: str, profile: bytes) -> Callable[[Image.Image], Image.Image]:
    """Return a function from images of mode `own` to sRGB."""
    parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = parsed.profile.xcolor_space.strip()
    mode = _PROFILE_MODES.get(space, "")
    source = {"CMYK": "CMYK", "LAB": "LAB", "1": "L", "LA": "L", "La": "L", "L": "L"}.get(own, "RGB")
    # Grey files with an RGB profile are common and mean what they say; other mixtures do not.
    if mode != source and (mode, source) != ("RGB", "L"):
        raise ValueError(f"it is for {space}, the picture is {own}")
    srgb = ImageCms.createProfile("sRGB")
    # lcms's shortcut is ten levels off in the shadows of grey; for colour it is right, and ten times faster.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(parsed, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags)
    if mode == "RGB" and _is_identity(transform):
        return lambda strip: _plain(strip, mode)

    def convert(strip: Image.Image) -> Image.Image:
        plain = _plain(strip, mode)
        return ImageCms.applyTransform(plain, transform) or plain

    return convert


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


def wide_to_srgb(strip: Image.Image, levels: ToSrgb, top: int) -> Pixels:
    """Convert grey of more than 8 bits, 0 to `top`, to (H, W, 3) sRGB in [0, 1], keeping its depth."""
    # Profiles are applied to 8 bits only, so the depth is kept by interpolating in a converted ramp.
    ramp = levels(Image.fromarray(np.arange(256, dtype=np.uint8)[None]))[0] / np.float32(255)
    grey = np.asarray(strip).astype(np.float64) / top * 255
    return np.stack([np.interp(grey, np.arange(256), ramp[:, c]).astype(np.float32) for c in range(3)], axis=-1)


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """Make the sRGB profile that saved pictures carry: always the same bytes."""
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    # lcms writes the current time at 24..35 of the header; a fixed one keeps outputs reproducible.
    made[24:36] = b"".join(part.to_bytes(2, "big") for part in (2000, 1, 1, 0, 0, 0))
    return bytes(made)
