"""Synthetic damage of printed photographs: scratches, fibres, creases, dust, and places without emulsion.

PFStorer and StableSR have no such damage; "Bringing Old Photos Back to Life" (Wan et al., CVPR 2020, section 3.3) draws
similar marks to train its detector. Every draw comes from the NumPy generator in the arguments.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Floats = npt.NDArray[np.float32]
Point = tuple[float, float]

FINER = 2
"""Marks are drawn at this multiple of the resolution, for smooth edges."""
VISIBLE = 0.15
"""Smallest opacity of a pixel that counts as damaged."""


class Damage(NamedTuple):
    """Marks that cover an image of H x W pixels."""

    color: Floats
    """(H, W, 3) in [0, 1]."""
    opacity: Floats
    """(H, W) in [0, 1]."""

    def on(self, image: Floats) -> Floats:
        """Return an image (H, W, 3) with the marks."""
        cover = self.opacity[..., None]
        return image * (1 - cover) + self.color * cover


def draw_damage(height: int, width: int, rng: np.random.Generator) -> Damage:
    """Draw the marks of one damaged photograph."""
    size = (width * FINER, height * FINER)
    canvas = Image.new("RGBA", size)
    draw, side = ImageDraw.Draw(canvas), float(min(size))
    palette = [_color(rng) for _ in range(1 + int(rng.integers(3)))]

    def paint() -> tuple[int, int, int, int]:
        color = palette[int(rng.integers(len(palette)))] if rng.random() < 0.8 else _color(rng)
        return (*color, int(255 * rng.uniform(0.35, 1)))

    def place() -> Point:
        return float(rng.uniform(0, size[0])), float(rng.uniform(0, size[1]))

    for _ in range(rng.poisson(rng.choice([0, 1, 3, 8]))):
        straight = rng.random() < 0.5
        length = side * rng.uniform(0.6, 2) if straight else side * rng.exponential(0.25)
        path = _path(place(), length, 0.01 if straight else 0.15, rng)
        draw.line(path, paint(), max(1, round(_log_uniform(0.5, 5, rng) * FINER)), "curve")
    for _ in range(rng.poisson(rng.choice([0, 0, 1, 4]))):
        path = _path(place(), FINER * rng.uniform(10, 70), 0.5, rng)
        draw.line(path, paint(), max(1, round(_log_uniform(0.5, 1.6, rng) * FINER)), "curve")
    for _ in range(rng.poisson(rng.choice([0, 2, 6, 25]))):
        draw.polygon(_blob(place(), FINER * _log_uniform(0.6, 7, rng), 0.3, rng), paint())
    if rng.random() < 0.2:
        draw.polygon(_blob(place(), FINER * rng.uniform(6, 30), 0.6, rng), paint())
    if rng.random() < 0.25:
        _draw_crease(draw, place(), side, rng)
    covered = _shares(canvas.convert("RGBa").reduce(FINER))  # the colours times the opacity
    opacity = covered[..., 3:]
    color = covered[..., :3] / np.maximum(opacity, 1 / 255)
    wear: Floats = np.ones((1, 1, 1), np.float32) if rng.random() < 0.4 else _wear(height, width, rng)[..., None]
    grain = _noise((height, width, 1), rng.uniform(0, 0.06), rng)
    return Damage((color + grain).clip(0, 1), (opacity * wear)[..., 0])


def _draw_crease(draw: ImageDraw.ImageDraw, start: Point, side: float, rng: np.random.Generator) -> None:
    """Draw a fold across the image: a bright line of bare paper between its shadow and its highlight."""
    path, wide = _path(start, 2 * side, 0.02, rng), round(FINER * rng.uniform(1.5, 6))
    for shift, level, share in ((-wide, 30, 0.35), (wide, 240, 0.25)):
        beside = [(x + shift, y + shift / 2) for x, y in path]
        draw.line(beside, (level, level, level, int(255 * share)), 2 * wide, "curve")
    level = int(rng.integers(190, 256))
    draw.line(path, (level, level, level, int(255 * rng.uniform(0.5, 1))), wide, "curve")


def _color(rng: np.random.Generator) -> tuple[int, int, int]:
    """Return bright paper, dark dirt, or one of the colours of the layers of emulsion."""
    kind = rng.random()
    if kind < 0.55:
        level, tint = rng.uniform(190, 255), rng.uniform(-15, 15, 3)
    elif kind < 0.85:
        level, tint = rng.uniform(0, 90), rng.uniform(-15, 15, 3)
    else:
        level, tint = rng.uniform(60, 220), rng.uniform(-90, 90, 3)
    red, green, blue = (int(v) for v in (level + tint).clip(0, 255))
    return red, green, blue


def _path(start: Point, length: float, bend: float, rng: np.random.Generator) -> list[Point]:
    """Return the points of a path through `start`; bend: standard deviation of its turns in radians."""
    steps = int(np.clip(length / (4 * FINER), 4, 60))
    # film and printers scratch along the edges
    aim = rng.normal(0, 0.03) + np.pi / 2 * rng.integers(2) if rng.random() < 0.4 else rng.uniform(0, np.pi)
    turns = aim + np.cumsum(rng.normal(0, bend, steps))
    xy = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * (length / steps), 0)
    xy += np.array(start) - xy[int(rng.integers(steps))]
    return [(float(x), float(y)) for x, y in xy]


def _blob(middle: Point, radius: float, rough: float, rng: np.random.Generator) -> list[Point]:
    """Return the corners of a spot; rough: standard deviation of the logarithm of its radius."""
    count = int(rng.integers(6, 16))
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    radii = radius * np.exp(rng.normal(0, rough, count))
    stretch, turn = np.exp(rng.normal(0, 0.4)), rng.uniform(0, np.pi)
    x, y = radii * np.cos(angles) * stretch, radii * np.sin(angles) / stretch
    c, s = np.cos(turn), np.sin(turn)
    return [(float(middle[0] + c * a - s * b), float(middle[1] + s * a + c * b)) for a, b in zip(x, y, strict=True)]


def _wear(height: int, width: int, rng: np.random.Generator) -> Floats:
    """Return a smooth random factor (H, W) of the opacity, so that marks fade and have gaps."""
    grid = rng.uniform(-0.2, 1.6, (max(2, height // 24), max(2, width // 24))).astype(np.float32)
    smooth = Image.fromarray(grid, "F").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32).clip(0, 1)


def _shares(levels: Image.Image) -> Floats:
    """Return the levels of an image as shares of 255."""
    return np.asarray(levels, np.float32) / np.float32(255)


def _noise(shape: tuple[int, int, int], deviation: float, rng: np.random.Generator) -> Floats:
    return rng.standard_normal(shape, np.float32) * np.float32(deviation)


def _log_uniform(low: float, high: float, rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


class Scan(NamedTuple):
    """How a photograph was printed and scanned: the same change for the damaged and the undamaged image."""

    fade: float
    """Share of the contrast that is lost."""
    tone: tuple[float, float, float] | None
    """Factors of the channels of a grey or toned photograph; None is a colour photograph."""
    blur: float
    """Standard deviation in pixels."""
    noise: Floats
    """(H, W, 1) for grey noise, else (H, W, 3)."""
    quality: int | None
    """Quality of JPEG; None stores the image without loss."""

    @classmethod
    def random(cls, height: int, width: int, rng: np.random.Generator) -> Scan:
        """Draw a scan of an image of height x width pixels."""
        toned = rng.random() < 0.45
        sepia = (1.06, 0.97, 0.8) if rng.random() < 0.4 else (1.0, 1.0, 1.0)
        grey = rng.random() < 0.5  # the noise of a grey scan has no colours
        noise = _noise((height, width, 1 if grey else 3), rng.uniform(0, 0.035), rng)
        return cls(
            fade=rng.uniform(0, 0.5) if rng.random() < 0.4 else 0.0,
            tone=sepia if toned else None,
            blur=rng.uniform(0.3, 1.2) if rng.random() < 0.4 else 0.0,
            noise=noise,
            quality=int(rng.integers(50, 96)) if rng.random() < 0.6 else None,
        )

    def of(self, image: Floats) -> Floats:
        """Return the scan (H, W, 3) in [0, 1] of an image."""
        if self.tone is not None:
            luma = image @ np.array([0.299, 0.587, 0.114], np.float32)
            image = luma[..., None] * np.array(self.tone, np.float32)
        image = image * (1 - self.fade) + 0.4 * self.fade
        levels = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
        if self.blur:
            levels = levels.filter(ImageFilter.GaussianBlur(self.blur))
        noisy = _shares(levels) + self.noise
        levels = Image.fromarray((noisy.clip(0, 1) * 255).round().astype(np.uint8))
        if self.quality is not None:
            file = io.BytesIO()
            levels.save(file, "JPEG", quality=self.quality)
            levels = Image.open(file)
        return _shares(levels)
