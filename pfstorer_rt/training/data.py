"""Photographs as training samples: a sample depends only on (seed, number), so that training can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from pfstorer_rt.diffusion import LAST
from pfstorer_rt.imaging.files import load_image, resize_bicubic

Batch = dict[str, torch.Tensor]


def read_photo(path: Path) -> torch.Tensor:
    """Read a photograph as (3, H, W) float32 in [0, 1]; transparency is dropped."""
    pixels = load_image(path).pixels
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()


def random_crop(
    image: torch.Tensor, size: int, rng: np.random.Generator, zoom: float = 1.5, flip: bool = True, wide: float = 1.0
) -> torch.Tensor:
    """Crop a square of `draw_square` and resize it: (3, H, W) in [0, 1] to (3, size, size) in [0, 1]."""
    return resize_square(cut_square(image, draw_square(image.shape[-2:], rng, zoom, flip, wide)), size)


class Square(NamedTuple):
    """A square of a photograph, in pixels; it may reach beyond the edges."""

    top: int
    left: int
    side: int
    flip: bool
    """Whether the square is flipped left to right."""


def draw_square(
    size: Sequence[int], rng: np.random.Generator, zoom: float = 1.5, flip: bool = True, wide: float = 1.0
) -> Square:
    """Draw a random square of a photograph, without alignment to the face (PFStorer section 4.1).

    size: height and width of the photograph. The side is the short side divided by U(1 / wide, zoom). flip: half of the
    squares are flipped left to right.
    """
    side = max(1, round(min(size) / rng.uniform(1.0 / wide, zoom)))
    top, left = (int(rng.integers(0, max(n, side) - side + 1)) - max(0, side - n) // 2 for n in size)
    return Square(top, left, side, flip and bool(rng.random() < 0.5))


def cut_square(image: torch.Tensor, square: Square) -> torch.Tensor:
    """Crop (3, H, W) to (3, side, side); the photograph is mirror-padded where the square is larger."""
    side = square.side
    top, left = (
        start + max(0, side - n) // 2 for start, n in zip((square.top, square.left), image.shape[-2:], strict=True)
    )
    cut = mirror_beyond_edges(image, side)[:, top : top + side, left : left + side]
    return cut.flip(-1) if square.flip else cut


def mirror_beyond_edges(image: torch.Tensor, side: int) -> torch.Tensor:
    """Mirror-pad (3, H, W) until both sides have at least `side` pixels (at most about three times the side)."""
    missing = [max(0, side - n) for n in image.shape[-2:]]
    if not any(missing):
        return image
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
    return F.pad(image[None], (left, right, top, bottom), mode="reflect")[0]


def center_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Crop (3, H, W) in [0, 1] to the central square and resize it to (3, size, size)."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize_square(image[:, top : top + side, left : left + side], size)


def resize_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize (3, s, s) in [0, 1] to (3, size, size)."""
    if image.shape[-1] == size:
        return image.contiguous()
    resized = resize_bicubic(image[None] * 2 - 1, (size, size), antialias=size < image.shape[-1])
    return (resized[0] + 1) / 2


class Photographs:
    """A list of photographs that are read on demand; small ones are enlarged.

    Crop k depends only on the seed, k, size and zoom.
    """

    def __init__(self, paths: Sequence[Path], seed: int) -> None:
        self.paths = list(paths)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def order(self, k: int) -> int:
        """Return the index of the photograph of sample `k`: every epoch is another permutation."""
        epoch, position = divmod(k, len(self.paths))
        return int(np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.paths))[position])

    def crop(self, k: int, size: int, zoom: float = 1.5, wide: float = 1.0) -> tuple[torch.Tensor, np.random.Generator]:
        """Return crop `k`, (3, size, size) in [0, 1], and its random generator, for the degradation."""
        rng = np.random.default_rng([self.seed, 2, k])
        return random_crop(read_photo(self.paths[self.order(k)]), size, rng, zoom, wide=wide), rng


class Iterations(Dataset[Batch]):
    """A function iteration -> batch as a dataset that a DataLoader can prefetch."""

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int) -> None:
        self.make, self.start, self.stop = make, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Batch:
        return self.make(self.start + index)


def draw_timesteps(count: int, first_step: float, generator: torch.Generator) -> torch.Tensor:
    """Draw (count,) timesteps from 0..999; a share of them is 999, where every restoration starts."""
    t = torch.randint(0, 1000, (count,), generator=generator)
    t[torch.rand(count, generator=generator) < first_step] = LAST
    return t


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def prefetch(make: Callable[[int], Batch], start: int, stop: int, workers: int) -> DataLoader[Any]:
    """Yield `make(start) ... make(stop - 1)` in order, prepared by `workers` processes."""
    return DataLoader(
        Iterations(make, start, stop),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if workers else None,
    )
