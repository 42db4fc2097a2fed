"""Batches of degraded tiles with references, made on the device from a `PhotoStore`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pfstorer_rt.degradation.batched import degrade_batch
from pfstorer_rt.degradation.levels import LEVELS, DegradationConfig
from pfstorer_rt.training.color_jitter import draw_jitter
from pfstorer_rt.training.photo_store import PhotoStore
from pfstorer_rt.training.views import ViewRange, draw_shifts, draw_view_maps, faces_in_views, sample_views

GROUP = 8
"""Tiles with the same sizes in the degradation."""
Drawn = tuple[torch.Tensor, torch.Tensor, npt.NDArray[Any], npt.NDArray[Any]]
"""Tiles, references, maps of the tiles, and maps of the references."""
Mix = tuple[tuple[str, float, float], ...]
"""Level, its `sf`, and its weight."""
PLAIN: Mix = (
    ("heavy", 4.0, 0.5),
    ("light", 4.0, 0.15),
    ("heavy", 2.0, 0.15),
    ("light", 2.0, 0.1),
    ("light", 1.0, 0.1),
)
WITH_REFERENCES: Mix = (("heavy", 4.0, 0.45), ("heavy", 8.0, 0.3), ("heavy", 2.0, 0.1), ("light", 4.0, 0.15))
"""Stronger degradations, since a reference adds little to a mild one."""
TARGET = ViewRange(0.55, 1.7, rotated=0.3, shift=1.0)
REFERENCE = ViewRange(0.8, 1.2, rotated=0.2, shift=0.6)
REAL_REFERENCE = ViewRange(0.85, 1.2, rotated=0.3, shift=0.6)
SINGLE = ViewRange(0.52, 1.3, rotated=0.3, shift=1.0)
JITTER = 0.5
"""Share of the tiles whose colours, contrast and brightness are changed at random; references keep theirs."""
SAME_IMAGE = 0.1
"""Share of the generated targets whose references are views of the same image."""


@dataclass(frozen=True)
class Layout:
    """Number of samples of each kind in a batch, in the order of the batch."""

    generated: int
    """Generated people with references."""
    people: int
    """Real people with references."""
    faces: int
    """Images of generated people, without references."""
    portraits: int
    """Real aligned photographs, without references."""
    mosaics: int
    """Four reduced images of generated people in one tile."""
    tiles: int
    """Composed tiles."""

    @classmethod
    def of(cls, batch: int, generator: bool) -> Layout:
        """Divide a batch; without a generator, real photographs replace the generated images."""
        generated, people, faces, portraits, mosaics = (batch * n // 64 for n in (26, 6, 8, 8, 6))
        known, plain = generated + people, faces + portraits + mosaics
        tiles = batch - known - plain
        return (
            cls(generated, people, faces, portraits, mosaics, tiles) if generator else cls(0, known, 0, plain, 0, tiles)
        )

    @property
    def known(self) -> int:
        """Samples with references, the first of a batch."""
        return self.generated + self.people

    @property
    def aligned(self) -> int:
        """Samples whose face has a known position, the first of a batch."""
        return self.known + self.faces + self.portraits

    @property
    def total(self) -> int:
        """Samples of a batch."""
        return self.aligned + self.mosaics + self.tiles


@dataclass
class Views:
    """A batch of tiles in [-1, 1]."""

    hq: torch.Tensor
    """Originals (B, 3, S, S)."""
    lq: torch.Tensor
    """Degraded tiles (B, 3, S, S)."""
    references: torch.Tensor
    """Other views of the first people (layout.known, R, 3, S, S), undegraded."""
    faces: npt.NDArray[Any]
    """Positions of the faces (layout.aligned, 2, 3) as `faces.recognizer.face_map`."""
    reference_faces: npt.NDArray[Any]
    """The same in the references (layout.known, R, 2, 3)."""


class ViewBatches:
    """Draws batches of views from a store."""

    def __init__(self, store: PhotoStore, layout: Layout) -> None:
        self.store, self.layout = store, layout

    @torch.no_grad()
    def __call__(self, references: int, clean: float, rng: np.random.Generator) -> Views:
        """Draw a batch; references: number for each person. clean: share of the tiles that are not degraded."""
        # The sizes of the degradation differ in every call, so a search for the fastest convolution would not end.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
            hq, others, faces, other_faces = self.originals(references, rng)
            hq = draw_jitter(len(hq), JITTER, rng).apply(hq)
            lq = degrade_batch(hq, self.levels(clean, rng), rng, GROUP)
        return Views(hq * 2 - 1, lq * 2 - 1, others * 2 - 1, faces, other_faces)

    @torch.no_grad()
    def originals(self, references: int, rng: np.random.Generator) -> Drawn:
        """Draw tiles (B, 3, S, S) and references (known, R, 3, S, S) in [0, 1], and positions of faces in both."""
        layout, store = self.layout, self.store
        generated, generated_references, generated_maps, generated_views = self.generated(references, rng)
        people, people_references, people_maps, people_views = self.people(references, rng)
        portraits = draw_shifts(layout.portraits, store.size, rng)
        chosen = rng.integers(0, len(store.photos), layout.portraits)
        faces, face_maps = self.faces(rng)
        composed = store.tiles[rng.integers(0, len(store.tiles), layout.tiles)].float() / 255
        portrait_tiles = sample_views(store.photos[chosen], portraits, store.size)
        tiles = torch.cat([generated, people, faces, portrait_tiles, self.mosaics(rng), composed])
        others = torch.cat([generated_references, people_references]).unflatten(0, (layout.known, references))
        positions = faces_in_views(np.concatenate([generated_maps, people_maps, face_maps, portraits]))
        other_positions = faces_in_views(np.concatenate([generated_views, people_views]))
        return tiles, others, positions, other_positions.reshape(layout.known, references, 2, 3)

    def generated(self, references: int, rng: np.random.Generator) -> Drawn:
        """Draw tiles, references (count * R, 3, S, S), and their maps, of generated people."""
        count, images, size = self.layout.generated, self.store.generated, self.store.size
        if images is None or not count:
            return self.nothing()
        per_person = images.per_person()
        who = rng.choice(images.filled, count, replace=images.filled < count)
        order = np.stack([rng.permutation(per_person) for _ in range(count)])
        # More references than other images repeat some of them, in other views.
        others = order[:, 1 + np.arange(references) % (per_person - 1)]
        others = np.where(rng.random((count, 1)) < SAME_IMAGE, order[:, :1], others)
        maps = draw_view_maps(count, TARGET, rng)
        tiles = sample_views(images.images[who, order[:, 0]], maps, size)
        views = draw_view_maps(count * references, REFERENCE, rng)
        images_of = images.images[np.repeat(who, references), others.reshape(-1)]
        return tiles, sample_views(images_of, views, size), maps, views

    def people(self, references: int, rng: np.random.Generator) -> Drawn:
        """Draw the same of real people; the references are other photographs of the person."""
        count, store = self.layout.people, self.store
        if not count:
            return self.nothing()
        who = rng.integers(0, len(store.first) - 1, count)
        start, photos = store.first[who], np.diff(store.first)[who]
        target = rng.integers(0, photos)
        other = rng.integers(1, photos[:, None], (count, references))
        chosen = start[:, None] + (target[:, None] + other) % photos[:, None]
        maps = draw_shifts(count, store.size, rng)
        tiles = sample_views(store.photos[start + target], maps, store.size)
        views = draw_view_maps(count * references, REAL_REFERENCE, rng)
        return tiles, sample_views(store.photos[chosen.reshape(-1)], views, store.size), maps, views

    def faces(self, rng: np.random.Generator) -> tuple[torch.Tensor, npt.NDArray[Any]]:
        """Draw tiles of generated people without references, and their maps."""
        count, images = self.layout.faces, self.store.generated
        if images is None or not count:
            return self.nothing()[1:3]
        chosen = rng.integers(0, images.filled, count), rng.integers(0, images.per_person(), count)
        maps = draw_view_maps(count, SINGLE, rng)
        return sample_views(images.images[chosen], maps, self.store.size), maps

    def mosaics(self, rng: np.random.Generator) -> torch.Tensor:
        """Draw tiles (count, 3, S, S) of four reduced images of generated people, at a random offset."""
        count, images, size = self.layout.mosaics, self.store.generated, self.store.size
        if images is None or not count:
            return self.nothing()[0]
        chosen = rng.integers(0, images.filled, 4 * count), rng.integers(0, images.per_person(), 4 * count)
        small = F.interpolate(images.images[chosen].float() / 255, (size // 2, size // 2), mode="area")
        small = small.unflatten(0, (count, 4))
        rows = [torch.cat([small[:, i], small[:, i + 1]], 3) for i in (0, 2)]
        y, x = (int(n) for n in rng.integers(0, size, 2))
        return torch.cat(rows, 2).roll((y, x), (2, 3))

    def nothing(self) -> Drawn:
        """Return no tiles, no references, and no maps."""
        empty = self.store.tiles.new_empty((0, 3, self.store.size, self.store.size), dtype=torch.float32)
        return empty, empty, np.empty((0, 3, 3)), np.empty((0, 3, 3))

    def levels(self, clean: float, rng: np.random.Generator) -> list[DegradationConfig]:
        """Draw the degradation of each tile; `GROUP` random tiles of one mix share theirs."""
        known, total = self.layout.known, self.layout.total
        order = np.concatenate([rng.permutation(known), known + rng.permutation(total - known)])
        configs = [LEVELS["heavy"]] * total
        for start in range(0, total, GROUP):
            config = draw_level(WITH_REFERENCES if start < known else PLAIN, clean, rng)
            for number in order[start : start + GROUP]:
                configs[number] = config
        return configs


def draw_level(mix: Mix, clean: float, rng: np.random.Generator) -> DegradationConfig:
    """Draw a degradation of a mix; clean: probability of an unchanged tile."""
    weights = np.array([weight for *_, weight in mix])
    level, factor, _ = mix[int(rng.choice(len(mix), p=weights / weights.sum()))]
    return replace(LEVELS[level], sf=factor, p_hq=clean)
