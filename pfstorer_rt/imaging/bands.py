"""Lazy image operations by rows: resize, pad, crop and colour fix, before and after the networks.

No class here stores an image. `read` computes the requested rows from the rows of the source.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pfstorer_rt.errors import PFStorerError, SettingError
from pfstorer_rt.imaging.color import (
    WAVELET_REACH,
    ColorFix,
    Statistics,
    channel_statistics,
    color_fix,
    match_statistics,
)
from pfstorer_rt.imaging.rows import TALL, Band, Rows, bands, read_ahead
from pfstorer_rt.tiling import Tile, pad_to_multiple

PADDING = 32
"""The sides of a canvas are multiples of this many pixels."""
GREY = 1.5 * 2 / 255
"""Smallest difference between the channels of a coloured pixel, in the range of [-1, 1]."""
LOBES = 3
"""Lobes of Lanczos's kernel, which shrinks. It keeps more detail than a bicubic kernel with a low-pass filter."""
MAX_SCALE = 16.0
"""Largest scale from the input image to the result."""
MAX_ENLARGEMENT = 8.0
"""Largest enlargement of an image that is smaller than a tile; padding adds the rest."""
MAX_TILES = 16
"""Longest side, in tiles, to which an image is enlarged."""


@dataclass(frozen=True)
class Canvas:
    """Sizes of the networks' canvas, its padding and the result, in pixels."""

    height: int
    width: int
    """Width of the enlarged image before padding; `height` likewise."""
    pad_bottom: int
    pad_right: int
    out_height: int
    out_width: int
    """Width of the result; `out_height` likewise."""

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) including the padding."""
        return self.height + self.pad_bottom, self.width + self.pad_right


def plan_canvas(height: int, width: int, tile: int, scale: float) -> Canvas:
    """Enlarge until the short side equals a tile, then pad to multiples of 32 and to at least one tile.

    The enlargement is limited to a factor of 8 and to a long side of 16 tiles (or to `scale`): 3 x 5000 must not become
    512 x 853333.
    Raises `ValueError` as `check_scale` does.
    """
    check_scale(scale)
    short, long = sorted((height, width))
    s = max(scale, min(tile / short, MAX_TILES * tile / long, MAX_ENLARGEMENT))
    h, w = max(1, round(height * s)), max(1, round(width * s))
    bottom, right = pad_to_multiple(max(h, tile), max(w, tile), PADDING)
    out = result_size(height, width, scale)
    return Canvas(h, w, max(h, tile) + bottom - h, max(w, tile) + right - w, *out)


def result_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Return (height, width) of the result of an image."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def check_scale(scale: float) -> None:
    """Raise `ValueError` unless the scale is valid."""
    if not 0 < scale <= MAX_SCALE:
        raise SettingError(f"scale {scale}: expected above 0 and at most {MAX_SCALE:g}", setting="scale")


class Resized:
    """A resized image, clamped to [-1, 1].

    antialias: apply a low-pass filter; use True to shrink. Without it, the image is enlarged bicubically as in
    StableSR (PyTorch's `interpolate`).
    """

    def __init__(self, source: Rows, height: int, width: int, antialias: bool) -> None:
        self.source, self.height, self.width, self.antialias = source, height, width, antialias

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        if (self.source.height, self.source.width) == (self.height, self.width):
            return self.source.read(start, stop)
        rows, weights = taps(self.source.height, self.height, start, stop, self.antialias)
        first, last = int(rows.min()), int(rows.max())
        band = weighted_sum(self.source.read(first, last + 1), rows - first, weights, 1)
        band = weighted_sum(band, *taps(self.source.width, self.width, 0, self.width, self.antialias), 2)
        return band.clip(-1, 1, out=band)


def taps(
    length: int, wanted: int, start: int, stop: int, antialias: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return source indices and weights of output pixels start..stop-1 along one axis, (n, taps) each.

    Pixel centres are at halves. Without antialias: the kernel of Keys with replicated borders, as in PyTorch. With
    antialias: Lanczos's kernel, stretched by the reduction factor, cut and renormalized at the borders, as in Pillow.
    """
    scale = length / wanted
    stretch = max(1.0, scale) if antialias else 1.0
    middle = (np.arange(start, stop) + 0.5) * scale - 0.5
    reach = math.ceil((LOBES if antialias else 2) * stretch)
    places = np.floor(middle).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    d = np.abs((places - middle[:, None]) / stretch)
    weights = lanczos(d) if antialias else keys(d)
    if antialias:
        weights = weights * ((places >= 0) & (places < length))
        weights = weights / weights.sum(1, keepdims=True)
    return places.clip(0, length - 1), weights.astype(np.float32)


def keys(d: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the cubic convolution kernel of Keys (1981), with PyTorch's a = -0.75, at distances d >= 0."""
    a = -0.75
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, inner, np.where(d < 2, outer, 0.0))


def lanczos(d: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the Lanczos kernel with `LOBES` lobes at distances d >= 0."""
    return np.where(d < LOBES, np.sinc(d) * np.sinc(d / LOBES), 0.0)


def weighted_sum(
    band: Band, places: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], axis: Literal[1, 2]
) -> Band:
    """Replace rows (axis 1) or columns (axis 2) of a band by weighted sums; places and weights as in `taps`."""
    shape = [len(places) if i == axis else n for i, n in enumerate(band.shape)]
    total, part = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    for place, weight in zip(places.T, weights.T, strict=True):
        np.take(band, place, axis, out=part, mode="clip")  # the other modes copy `out`
        part *= weight[:, None] if axis == 1 else weight
        total += part
    return total


class Padded:
    """An image padded at the right and bottom by reflection, or by replication if it is too small to reflect."""

    def __init__(self, source: Rows, canvas: Canvas) -> None:
        self.source, self.right = source, canvas.pad_right
        self.height, self.width = canvas.padded
        self.small = canvas.pad_right >= canvas.width or canvas.pad_bottom >= canvas.height

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        last = self.source.height - 1
        places = np.arange(start, stop)
        places = np.where(places > last, last if self.small else 2 * last - places, places)
        first = int(places.min())
        band = self.source.read(first, int(places.max()) + 1)
        if stop > self.source.height:
            band = band[:, places - first]
        return np.pad(band, ((0, 0), (0, 0), (0, self.right)), "edge" if self.small else "reflect")


class Grey:
    """An image without its colours: every channel is the luma of the other image (ITU-R BT.601)."""

    WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)

    def __init__(self, source: Rows) -> None:
        self.source, self.height, self.width = source, source.height, source.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        luma = np.tensordot(self.WEIGHTS, self.source.read(start, stop), 1)
        return np.repeat(luma[None], 3, 0)


def is_grey(source: Rows) -> bool:
    """Whether the channels of every pixel differ by at most one level of 255; reads as far as the first colour."""
    for start, stop in bands(source.height, source.width):
        band = source.read(start, stop)
        if np.abs(band - band[:1]).max() > GREY:
            return False
    return True


class Cropped:
    """A crop of another image."""

    def __init__(self, source: Rows, tile: Tile) -> None:
        self.source, self.tile, self.height, self.width = source, tile, tile.height, tile.width

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1 of the crop."""
        columns = slice(self.tile.x, self.tile.x + self.width)
        return self.source.read(self.tile.y + start, self.tile.y + stop)[..., columns]


class ColorFixed:
    """The content image with the colours of the style image. AdaIN statistics cover the whole images."""

    def __init__(self, content: Rows, style: Rows, kind: ColorFix) -> None:
        self.content, self.style, self.kind = content, style, kind
        self.height, self.width = content.height, content.width
        self._statistics: tuple[Statistics, Statistics] | None = None
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        if self.kind == "adain":
            with self._lock:  # the first thread computes them for all
                self._statistics = self._statistics or (_statistics(self.content), _statistics(self.style))
            return match_statistics(self.content.read(start, stop), *self._statistics).clip(-1, 1)
        margin = WAVELET_REACH if self.kind == "wavelet" else 0
        top, bottom = max(0, start - margin), min(self.height, stop + margin)
        fixed = color_fix(self.content.read(top, bottom), self.style.read(top, bottom), self.kind)
        return fixed[:, start - top : stop - top].clip(-1, 1)


def _statistics(source: Rows) -> Statistics:
    return channel_statistics(read_ahead(source.read, bands(source.height, source.width, least=TALL)))


class Result:
    """The restored image: the canvas without padding, resized to the output size."""

    def __init__(self, fixed: Rows, canvas: Canvas, complaint: str) -> None:
        """complaint: message of the `PFStorerError` that `read` raises for non-finite values."""
        self.height, self.width, self.complaint = canvas.out_height, canvas.out_width, complaint
        image = Cropped(fixed, Tile(0, 0, canvas.height, canvas.width))
        self.source = Resized(image, self.height, self.width, antialias=self.height < canvas.height)

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        band = self.source.read(start, stop)
        if not np.isfinite(band).all():
            raise PFStorerError(self.complaint)
        return band
