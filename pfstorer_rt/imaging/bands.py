"""A picture on its way in and out, by rows: enlarged and padded to the canvas, colour-fixed and brought to size.

Nothing here holds a picture: each step reads the rows that it needs from the step before, when it is asked for some.
Bands of a canvas are tensors (1, 3, n, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging.color import (
    WAVELET_REACH,
    ColorFix,
    Statistics,
    channel_statistics,
    color_fix,
    match_statistics,
)
from pfstorer_rt.imaging.files import from_tensor, to_tensor
from pfstorer_rt.imaging.rows import TALL, Pixels, Rows, Spool, bands
from pfstorer_rt.tiling import Tile, pad_to_multiple

PADDING = 32
"""The canvas's sides are multiples of this, in pixels."""
MAX_SCALE = 16.0
"""Largest factor by which a result may be larger than its input."""
MAX_ENLARGEMENT = 4.0
"""A picture smaller than a tile is enlarged to one by at most this factor, and padded for the rest."""


@dataclass(frozen=True)
class Canvas:
    """How a picture is laid on the canvas that the networks see, in pixels."""

    height: int
    width: int
    """Of the enlarged picture, before padding."""
    pad_bottom: int
    pad_right: int
    out_height: int
    out_width: int
    """Of the result."""

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width with the padding."""
        return self.height + self.pad_bottom, self.width + self.pad_right


def plan_canvas(height: int, width: int, tile: int, scale: float) -> Canvas:
    """Enlarge until the short side is a tile, then pad to multiples of 32 and to at least a tile.

    Enlarging stops at a factor of 4 (or at `scale`): a picture of a few pixels is padded, so that
    3 x 5000 does not become 192 x 320000. Raises `ValueError` as `check_scale` does.
    """
    check_scale(scale)
    s = max(scale, min(tile / min(height, width), max(MAX_ENLARGEMENT, scale)))
    h, w = max(1, round(height * s)), max(1, round(width * s))
    bottom, right = pad_to_multiple(max(h, tile), max(w, tile), PADDING)
    out = max(1, round(height * scale)), max(1, round(width * scale))
    return Canvas(h, w, max(h, tile) + bottom - h, max(w, tile) + right - w, *out)


def check_scale(scale: float) -> None:
    """Raise `ValueError` unless an image can be enlarged by this factor."""
    if not 0 < scale <= MAX_SCALE:
        raise ValueError(f"scale {scale}: expected above 0 and at most {MAX_SCALE:g}")


class Bands(Protocol):
    """A canvas that is asked for by rows."""

    height: int
    width: int

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start..stop-1: (1, 3, stop - start, width) float32."""
        ...


class Resized:
    """Bands of another size, bicubic: `image.resize_bicubic` of the whole, by rows."""

    def __init__(self, source: Bands, height: int, width: int, antialias: bool) -> None:
        self.source, self.height, self.width, self.antialias = source, height, width, antialias

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start..stop-1, clamped to [-1, 1]."""
        if (self.source.height, self.source.width) == (self.height, self.width):
            return self.source.read(start, stop)
        rows, weights = cubic_taps(self.source.height, self.height, start, stop, self.antialias)
        first, last = int(rows.min()), int(rows.max())
        band = self.source.read(first, last + 1)
        size = (band.shape[-2], self.width)
        band = F.interpolate(band, size, mode="bicubic", align_corners=False, antialias=self.antialias)
        out = torch.zeros(1, 3, stop - start, self.width)
        for tap in range(rows.shape[1]):
            out += band[:, :, rows[:, tap] - first] * weights[:, tap, None]
        return out.clamp_(-1, 1)


def cubic_taps(length: int, wanted: int, start: int, stop: int, antialias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which source pixels the results start..stop-1 of an axis are made of, and their weights, (n, taps) each.

    Keys' kernel (1981) at half-pixel centres. As PyTorch has it: a = -0.75 and borders repeated; with antialias
    a = -0.5, the kernel stretched by the factor of shrinking, and cut and renormalized at borders.
    """
    scale = length / wanted
    stretch, a = (max(1.0, scale), -0.5) if antialias else (1.0, -0.75)
    middle = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale - 0.5
    reach = int(2 * stretch) + 1
    near = torch.arange(-reach, reach + 1)
    places = middle.floor().long()[:, None] + near
    d = ((places - middle[:, None]) / stretch).abs()
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    weights = torch.where(d <= 1, inner, torch.where(d < 2, outer, 0.0))
    if antialias:
        weights = weights * ((places >= 0) & (places < length))
        weights = weights / weights.sum(1, keepdim=True)
    return places.clamp(0, length - 1), weights.float()


class Unit:
    """Rows in [0, 1] as bands in [-1, 1]."""

    def __init__(self, source: Rows) -> None:
        self.source, self.height, self.width = source, source.height, source.width

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start..stop-1."""
        return to_tensor(self.source.read(start, stop))


class Padded:
    """Bands with a reflected border at the right and bottom; where they are too small to reflect, a repeated edge."""

    def __init__(self, source: Bands, canvas: Canvas) -> None:
        self.source, self.right = source, canvas.pad_right
        self.height, self.width = canvas.padded
        small = canvas.pad_right >= canvas.width or canvas.pad_bottom >= canvas.height
        self.mode = "replicate" if small else "reflect"

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start..stop-1."""
        last = self.source.height - 1
        places = torch.arange(start, stop)
        mirrored = 2 * last - places if self.mode == "reflect" else torch.full_like(places, last)
        places = torch.where(places > last, mirrored, places)
        first = int(places.min())
        band = self.source.read(first, int(places.max()) + 1)
        if stop > self.source.height:
            band = band[:, :, places - first]
        return F.pad(band, (0, self.right, 0, 0), mode=self.mode) if self.right else band


class Cropped:
    """A rectangle of other bands."""

    def __init__(self, source: Bands, tile: Tile) -> None:
        self.source, self.tile, self.height, self.width = source, tile, tile.height, tile.width

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start..stop-1 of the rectangle."""
        columns = slice(self.tile.x, self.tile.x + self.width)
        return self.source.read(self.tile.y + start, self.tile.y + stop)[..., columns]


class Spooled:
    """Bands that were written: (n, W, 3) rows of a spool in [-1, 1]."""

    def __init__(self, spool: Spool) -> None:
        self.spool, self.height, self.width = spool, spool.height, spool.width

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start..stop-1."""
        return torch.from_numpy(self.spool.read(start, stop)).permute(2, 0, 1)[None].contiguous()


class ColorFixed:
    """Content with the colours of the style, in [-1, 1]; what AdaIN needs is taken from the whole, once."""

    def __init__(self, content: Bands, style: Bands, kind: ColorFix) -> None:
        self.content, self.style, self.kind = content, style, kind
        self.height, self.width = content.height, content.width
        self._statistics: tuple[Statistics, Statistics] | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start..stop-1."""
        if self.kind == "adain":
            self._statistics = self._statistics or (_statistics(self.content), _statistics(self.style))
            return match_statistics(self.content.read(start, stop), *self._statistics).clamp(-1, 1)
        margin = WAVELET_REACH if self.kind == "wavelet" else 0
        top, bottom = max(0, start - margin), min(self.height, stop + margin)
        fixed = color_fix(self.content.read(top, bottom), self.style.read(top, bottom), self.kind)
        return fixed[:, :, start - top : stop - top].clamp(-1, 1)


def _statistics(source: Bands) -> Statistics:
    return channel_statistics(source.read(*band) for band in bands(source.height, source.width, least=TALL))


class Result:
    """The finished picture: the canvas without its padding, at the result's size, as rows in [0, 1]."""

    def __init__(self, fixed: Bands, canvas: Canvas, complaint: Callable[[], str]) -> None:
        """complaint: the message of the `PFStorerError` that values which are not finite raise when they are read."""
        self.height, self.width, self.complaint = canvas.out_height, canvas.out_width, complaint
        picture = Cropped(fixed, Tile(0, 0, canvas.height, canvas.width))
        self.source = Resized(picture, self.height, self.width, antialias=self.height < canvas.height)

    def read(self, start: int, stop: int) -> Pixels:
        """Return rows start..stop-1, (n, W, 3)."""
        band = self.source.read(start, stop)
        if not bool(torch.isfinite(band).all()):
            raise PFStorerError(self.complaint())
        return from_tensor(band)
