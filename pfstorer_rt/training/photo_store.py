"""Photographs in the memory of the device, for a training whose tiles are made while it runs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pfstorer_rt.training.tiles import Bytes, Source, TileComposer

VARIETY = ((0.8, 0.8), (1.0, 0.75), (0.65, 0.85))
"""Variation between the images of a person, and truncation; used in turn."""
FIRST_SEED = 20_000
"""Seed of the first generated people; an evaluation must use other seeds."""
PART = 12
"""Images that are generated at once."""


class PeopleGenerator(Protocol):
    """A network that generates images of people who do not exist."""

    def people(
        self, count: int, per_person: int, *, seed: int, size: int, variation: float, truncation: float, batch: int
    ) -> torch.Tensor:
        """Return aligned images (count, per_person, 3, size, size) uint8 on the device of the generator."""


@dataclass(frozen=True)
class Photographs:
    """Files from which a store is read.

    Photographs of people and portraits must be square and aligned as the FFHQ data set.
    """

    people: Sequence[Sequence[Path]]
    """At least two photographs of each person."""
    portraits: Sequence[Path]
    """Photographs of people with one photograph."""
    sources: Sequence[Source]
    """Photographs of any content and size."""


@dataclass
class GeneratedPeople:
    """Images (N, K, 3, S, S) uint8 of N generated people; new people replace the oldest."""

    generator: PeopleGenerator
    images: torch.Tensor
    made: int = 0
    """Number of people generated so far."""

    @property
    def filled(self) -> int:
        """Number of people in `images`."""
        return min(self.made, len(self.images))

    def per_person(self) -> int:
        """Return the number of images of each person."""
        return self.images.shape[1]

    @torch.no_grad()
    def refill(self, count: int) -> None:
        """Generate new people."""
        variation, truncation = VARIETY[(self.made // max(count, 1)) % len(VARIETY)]
        rows = torch.arange(self.made, self.made + count, device=self.images.device) % len(self.images)
        self.images[rows] = self.generator.people(
            count,
            self.images.shape[1],
            seed=FIRST_SEED + self.made,
            size=self.images.shape[-1],
            variation=variation,
            truncation=truncation,
            batch=PART,
        )
        self.made += count


@dataclass
class PhotoStore:
    """Photographs on one device, (N, 3, S, S) uint8."""

    photos: torch.Tensor
    """Aligned photographs: first those of people, sorted by person, then the portraits."""
    first: npt.NDArray[np.int64]
    """Number of the first photograph of each person, and the end of the last person, (P + 1,)."""
    tiles: torch.Tensor
    """Tiles composed from photographs of any content and size."""
    generated: GeneratedPeople | None = field(default=None)

    @property
    def size(self) -> int:
        """Side of the photographs in pixels."""
        return self.photos.shape[-1]


def read_store(
    photographs: Photographs,
    size: int,
    tiles: int,
    device: torch.device,
    generated: GeneratedPeople | None = None,
    workers: int = 1,
    seed: int = 0,
) -> PhotoStore:
    """Read photographs to the device, reduced to `size` pixels, and compose tiles.

    tiles: number of composed tiles. workers: processes that read files.
    """
    paths = [path for person in photographs.people for path in person] + list(photographs.portraits)
    first = np.cumsum([0, *map(len, photographs.people)])
    with mapping(workers) as apply:
        photos = on_device(apply(partial(read_square, size), paths), device)
        composed = on_device(apply(partial(compose, photographs.sources, size, seed), range(tiles)), device)
    return PhotoStore(photos, first, composed, generated)


@contextmanager
def mapping(workers: int) -> Iterator[Callable[..., Any]]:
    """Yield `map`, or its equal over processes."""
    if workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=8)


def on_device(images: Iterator[Bytes], device: torch.device) -> torch.Tensor:
    """Stack images (H, W, 3) as (N, 3, H, W) on a device."""
    return torch.from_numpy(np.stack(list(images))).to(device).movedim(-1, 1).contiguous()


def read_square(size: int, path: Path) -> Bytes:
    """Read the central square of a photograph at `size` pixels, (size, size, 3)."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image if side == size else image.resize((size, size), Image.Resampling.LANCZOS))


def compose(sources: Sequence[Source], size: int, seed: int, number: int) -> Bytes:
    """Compose tile `number`, (size, size, 3)."""
    return TileComposer(sources, size, seed)(number)[0]
