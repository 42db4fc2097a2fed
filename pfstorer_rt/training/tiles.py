"""Training tiles with faces at every scale: large photographs are reduced, small ones keep their size.

Photographs are never enlarged, because a base trained on enlarged photographs learns to restore blur. A photograph that
is smaller than the tile shares the tile with others. Every tile is a pure function of (seed, number).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Bytes = npt.NDArray[np.uint8]
SMALLEST = 160
"""Short side in pixels below which a photograph is not reduced."""
LARGEST_SHRINKING = 4.0
"""Largest factor by which a photograph is reduced."""
ROTATED, ANGLE, SLIGHT = 0.25, 20.0, 0.7
"""Share of the cells that are rotated, standard deviation of the angle in degrees, and largest scale of a rotated cell,
whose reduction removes the blur of the interpolation."""


@dataclass(frozen=True)
class Source:
    """A set of photographs, and its weight in the choice of a tile's first photograph."""

    paths: Sequence[Path]
    weight: float


class TileComposer:
    """Composes square tiles, (size, size, 3) uint8, from sources of photographs of any size."""

    def __init__(self, sources: Sequence[Source], size: int, seed: int) -> None:
        self.sources, self.size, self.seed = list(sources), size, seed
        weights = np.array([source.weight for source in sources], float)
        self.weights = weights / weights.sum()

    def __call__(self, number: int) -> tuple[Bytes, np.random.Generator]:
        """Return tile `number` and its random generator."""
        rng = np.random.default_rng([self.seed, 17, number])
        source = self.sources[int(rng.choice(len(self.sources), p=self.weights))]
        path = source.paths[int(rng.integers(len(source.paths)))]
        side = short_side(path)
        cell = round(side * draw_scale(side, rng))
        if cell >= self.size:
            return random_window(load_cell(path, cell, rng), self.size, rng), rng
        return self.fill(source, path, cell, rng), rng

    def fill(self, source: Source, first: Path, cell: int, rng: np.random.Generator) -> Bytes:
        """Fill a tile with a grid of equal cells at a random offset; the first photograph is near the centre."""
        top, left = (int(n) for n in rng.integers(0, self.size - cell + 1, 2))
        tile: Bytes = np.zeros((self.size, self.size, 3), np.uint8)
        for y in range(top % cell - cell, self.size, cell):
            for x in range(left % cell - cell, self.size, cell):
                path = first if (y, x) == (top, left) else self.another(source, first, cell, rng)
                paste(tile, load_cell(path, cell, rng), y, x)
        return tile

    def another(self, source: Source, first: Path, cell: int, rng: np.random.Generator) -> Path:
        """Draw a photograph of the source that fills the cell without enlargement; `first` if there is none."""
        for _ in range(8):
            path = source.paths[int(rng.integers(len(source.paths)))]
            if short_side(path) >= cell:
                return path
        return first


def short_side(path: Path) -> int:
    """Return the shorter side of a photograph in pixels, read from its header."""
    with Image.open(path) as image:
        return min(image.size)


def draw_scale(side: int, rng: np.random.Generator) -> float:
    """Draw the scale, at most 1, of a photograph with this short side."""
    least = min(1.0, max(1 / LARGEST_SHRINKING, SMALLEST / side))
    return float(rng.uniform(least, 1.0))


def load_cell(path: Path, cell: int, rng: np.random.Generator) -> Bytes:
    """Read a photograph, rotate or flip it at random, and crop its central square, `cell` pixels wide."""
    with Image.open(path) as file:
        file.draft("RGB", (2 * cell, 2 * cell))  # a JPEG decodes faster at a reduced size
        image = file.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if cell <= SLIGHT * side and rng.random() < ROTATED:
        image = rotate(image, float(rng.normal(0, ANGLE)))
    if side != cell:
        image = image.resize((cell, cell), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate an image about its centre by up to about 45 degrees; it is mirrored beyond its edges."""
    border = min(image.size) // 4
    padded = np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), mode="reflect")
    turned = Image.fromarray(padded).rotate(degrees, Image.Resampling.BICUBIC)
    return turned.crop((border, border, border + image.width, border + image.height))


def random_window(image: Bytes, size: int, rng: np.random.Generator) -> Bytes:
    """Crop (H, W, 3) to a random square of `size` pixels."""
    top, left = (int(rng.integers(0, n - size + 1)) for n in image.shape[:2])
    return image[top : top + size, left : left + size]


def paste(tile: Bytes, cell: Bytes, top: int, left: int) -> None:
    """Write a cell into a tile; the part outside the tile is ignored."""
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = (min(p + n, m) for p, n, m in zip((top, left), cell.shape[:2], tile.shape[:2], strict=True))
    if y1 > y0 and x1 > x0:
        tile[y0:y1, x0:x1] = cell[y0 - top : y1 - top, x0 - left : x1 - left]
