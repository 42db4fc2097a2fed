"""Colour profiles: conversion of an image to sRGB, and the sRGB profile embedded in results."""

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
    """Return a function that converts strips of an image to sRGB, and whether it applies the colour profile."""
    if profile is not None:
        try:
            convert = _profile_converter(mode, profile)
            probe = image.crop((0, 0, 1, 1)) if mode == image.mode else Image.new(mode, (1, 1))
            convert(probe)
            return (lambda strip: np.asarray(convert(strip))), True
        except Exception as error:  # lcms raises many exception types on invalid profiles
            notes.append(f"colour profile ignored: {one_line(error)}")
    if mode == "CMYK":
        notes.append("CMYK without a usable profile: colours are approximate")
    return (lambda strip: np.asarray(_plain(strip, "RGB"))), False


def _profile_converter(own: str, profile: bytes) -> Callable[[Image.Image], Image.Image]:
    """Return a function that converts images of mode `own` to sRGB."""
    parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = parsed.profile.xcolor_space.strip()
    mode = _PROFILE_MODES.get(space, "")
    source = {"CMYK": "CMYK", "LAB": "LAB", "1": "L", "LA": "L", "La": "L", "L": "L"}.get(own, "RGB")
    # Grey files with an RGB profile are common and valid; other mismatches are errors.
    if mode != source and (mode, source) != ("RGB", "L"):
        raise ValueError(f"it is for {space}, the image is {own}")
    srgb = ImageCms.createProfile("sRGB")
    # The optimization of lcms is wrong by ten levels in grey shadows. For colour it is correct and ten times faster.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(parsed, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags)
    if mode == "RGB" and _is_identity(transform):
        return lambda strip: _plain(strip, mode)

    def convert(strip: Image.Image) -> Image.Image:
        plain = _plain(strip, mode)
        return ImageCms.applyTransform(plain, transform) or plain

    return convert


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    # sRGB profiles from different vendors differ by rounding; a conversion between them would only add noise.
    axis = np.linspace(0, 255, 18).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(18, -1, 3)
    converted = ImageCms.applyTransform(Image.fromarray(probe), transform)
    return bool(np.abs(np.asarray(converted, dtype=int) - probe.astype(int)).max() <= 1)


def _plain(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    return image if image.mode == mode else image.convert(mode)


def wide_to_srgb(strip: Image.Image, levels: ToSrgb, top: int) -> Pixels:
    """Convert grey of more than 8 bits, 0 to `top`, to (H, W, 3) sRGB in [0, 1], keeping its depth."""
    # Pillow applies profiles to 8 bits only. Interpolation in a converted ramp keeps the depth.
    ramp = levels(Image.fromarray(np.arange(256, dtype=np.uint8)[None]))[0] / np.float32(255)
    grey = np.asarray(strip).astype(np.float64) / top * 255
    return np.stack([np.interp(grey, np.arange(256), ramp[:, c]).astype(np.float32) for c in range(3)], axis=-1)


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """Return the sRGB profile for saved images; the bytes are always the same."""
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    # lcms writes the current time to bytes 24..35 of the header; a fixed time keeps outputs reproducible.
    made[24:36] = b"".join(part.to_bytes(2, "big") for part in (2000, 1, 1, 0, 0, 0))
    return bytes(made)
