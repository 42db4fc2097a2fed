"""Compose images with faces of known size in front of plain materials; used by `whole.py`.

A portrait is scaled so that its face has the wanted size, and is blended into a material. The size of a face is the
side of its box from `faces.finding.find_boxes`, from the brows to the chin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

from pfstorer_rt.faces.finding import Box
from pfstorer_rt.imaging.rows import Pixels

Field = npt.NDArray[np.float32]
FEATHER = 0.12
"""Width of the transition from a portrait to its background, relative to the portrait."""


class Portrait(NamedTuple):
    """A photograph of one face."""

    pixels: Pixels
    face: Box


class Spot(NamedTuple):
    """A face in a scene: the centre relative to the scene, and the side of its box in pixels."""

    x: float
    y: float
    side: float


class Scene(NamedTuple):
    """An image to compose."""

    name: str
    width: int
    height: int
    material: str
    spots: tuple[Spot, ...]


def compose(scene: Scene, portraits: list[Portrait], seed: int) -> Pixels:
    """Return (H, W, 3) in [0, 1]: the portraits in the spots of a scene, one portrait a spot."""
    canvas = material(scene.material, scene.height, scene.width, seed)
    for spot, portrait in zip(scene.spots, portraits, strict=True):
        paste(canvas, portrait, spot)
    return canvas.clip(0, 1)


def paste(canvas: Pixels, portrait: Portrait, spot: Spot) -> None:
    """Blend a portrait into a canvas, its face at a spot; parts outside the canvas are cut off."""
    height, width = canvas.shape[:2]
    scale, face = spot.side / portrait.face.side, portrait.face
    sides = tuple(max(1, round(n * scale)) for n in portrait.pixels.shape[:2])
    image = enlarge(portrait.pixels, *sides)
    left = round(spot.x * width - (face.left + face.side / 2) * scale)
    top = round(spot.y * height - (face.top + face.side / 2) * scale)
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(height, top + sides[0]), min(width, left + sides[1])
    inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    weight = feathered(*sides)[inside][..., None]
    canvas[y0:y1, x0:x1] += weight * (image[inside] - canvas[y0:y1, x0:x1])


def enlarge(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize (H, W, 3) in [0, 1] with Lanczos' filter."""
    planes = [Image.fromarray(np.ascontiguousarray(pixels[..., c]), "F") for c in range(3)]
    return np.stack([np.asarray(p.resize((width, height), Image.Resampling.LANCZOS)) for p in planes], -1).clip(0, 1)


def feathered(height: int, width: int) -> Field:
    """Return weights (height, width): 1 inside, falling to 0 at the left, top and right edges."""
    y, x = (np.linspace(0, 1, n, dtype=np.float32) for n in (height, width))
    across = np.minimum(x, 1 - x).clip(0, FEATHER) / FEATHER
    down = y.clip(0, FEATHER) / FEATHER
    return smooth(down)[:, None] * smooth(across)


def smooth(x: Field) -> Field:
    """Return the smoothstep of values in [0, 1]."""
    return x * x * (3 - 2 * x)


def material(name: str, height: int, width: int, seed: int) -> Pixels:
    """Return (H, W, 3) in [0, 1] of a material without faces: hair, cloth, wall, sky, skin or leaves."""
    return MATERIALS[name](height, width, np.random.default_rng([seed, 5]))


def noise(height: int, width: int, rng: np.random.Generator, sigma: float | tuple[float, float]) -> Field:
    """Return smooth noise of standard deviation 1; sigma: radius of the smoothing in pixels."""
    field = gaussian_filter(rng.standard_normal((height, width)).astype(np.float32), sigma, mode="wrap")
    return field / max(float(field.std()), 1e-6)


def hair(height: int, width: int, rng: np.random.Generator) -> Pixels:
    strands = noise(height, width, rng, (40, 1.0)) * 0.07 + noise(height, width, rng, (90, 6)) * 0.06
    bent = np.stack([np.roll(row, round(18 * np.sin(y / 90))) for y, row in enumerate(strands)])
    return coloured(0.28 + bent, (1.15, 0.85, 0.6))


def cloth(height: int, width: int, rng: np.random.Generator) -> Pixels:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    weave = 0.05 * np.sin(x * 1.1) * np.sin(y * 1.1)
    return coloured(0.42 + weave + 0.07 * noise(height, width, rng, (60, 35)), (0.6, 0.8, 1.2))


def wall(height: int, width: int, rng: np.random.Generator) -> Pixels:
    rough = 0.025 * noise(height, width, rng, 1.2) + 0.03 * noise(height, width, rng, 70)
    return coloured(0.62 + rough, (1.03, 1.0, 0.93))


def sky(height: int, width: int, rng: np.random.Generator) -> Pixels:
    fall = np.linspace(-0.12, 0.12, height, dtype=np.float32)[:, None]
    return coloured(0.65 + fall + 0.05 * noise(height, width, rng, (25, 90)), (0.8, 0.97, 1.2))


def skin(height: int, width: int, rng: np.random.Generator) -> Pixels:
    pores = 0.012 * noise(height, width, rng, 0.9) + 0.02 * noise(height, width, rng, 12)
    return coloured(0.62 + pores + 0.05 * noise(height, width, rng, 120), (1.2, 0.92, 0.78))


def leaves(height: int, width: int, rng: np.random.Generator) -> Pixels:
    blades = noise(height, width, rng, (6, 2.5)) * 0.09 + noise(height, width, rng, 25) * 0.08
    return coloured(0.32 + blades, (0.8, 1.15, 0.5))


def coloured(grey: Field, colour: tuple[float, float, float]) -> Pixels:
    """Multiply a grey image (H, W) by a colour."""
    return (grey[..., None] * np.array(colour, np.float32)).clip(0, 1).astype(np.float32)


MATERIALS: dict[str, Callable[[int, int, np.random.Generator], Pixels]] = {
    "hair": hair,
    "cloth": cloth,
    "wall": wall,
    "sky": sky,
    "skin": skin,
    "leaves": leaves,
}
