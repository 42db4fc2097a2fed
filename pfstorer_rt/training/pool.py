"""Training data of an identity: degraded crops of the photographs, encoded once, and batches drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.degradation.degrade import LEVELS, DegradationConfig, degrade
from pfstorer_rt.models.base import Base
from pfstorer_rt.progress import OnProgress, ignore_progress
from pfstorer_rt.training.chunks import Samples, make_arrays
from pfstorer_rt.training.data import Batch, Square, center_crop, cut_square, draw_square, draw_timesteps, resize_square
from pfstorer_rt.training.image_loss import NO_FACE, draw_views, face_maps, has_image_losses

CHUNK = 8
"""Samples that are made and written at once."""
FACE = 2 / 3
"""Side of a face without its border, relative to the recognizer's input square."""
ZOOM = 1.25
"""Largest magnification of a training crop: most of the face stays inside."""


class LatentPool(NamedTuple):
    """Scaled latents on the CPU: pairs of crops, and the references. (StableSR also trains from a pool of pairs.)"""

    hq: torch.Tensor
    """(N, C, h, w)"""
    lq: torch.Tensor
    """(N, C, h, w) of the same crops, degraded"""
    photo: torch.Tensor
    """(N,) number of the photograph of each crop"""
    references: torch.Tensor
    """(P, C, h, w) of the centre crop of every photograph"""
    images: torch.Tensor | None = None
    """(N, 2, 3, H, W) uint8, hq and lq; None without image-space losses"""
    maps: npt.NDArray[np.float32] | None = None
    """(N, 2, 3) positions of the faces (`face_map`)"""


@torch.no_grad()
def make_pool(
    photos: Sequence[torch.Tensor],
    base: Base,
    config: PersonalizeConfig,
    on_progress: OnProgress = ignore_progress,
    work: Path | None = None,
    mark: str = "",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> LatentPool:
    """Crop, degrade and encode `pool_size` samples, taking the photographs in turn.

    photos: (3, H, W) in [0, 1]. The same seed gives the same pool. work: folder that keeps the samples; the next call
    with the same `mark` uses or completes them. None keeps them in memory. autocast: makes the context in which crops
    are encoded, such as autocasting to bf16.
    """
    level, size, tile = replace(LEVELS[config.level], p_hq=config.p_hq), pool_size(config), base.config.tile
    latent = (2, base.config.latent_channels, base.config.latent_tile, base.config.latent_tile)
    arrays: dict[str, tuple[type, tuple[int, ...]]] = {"latents": (np.float32, latent)}
    faces = np.stack([NO_FACE for _ in photos])
    if has_image_losses(config):
        faces = face_maps([photo.permute(1, 2, 0).numpy() for photo in photos])
        arrays |= {"images": (np.uint8, (2, 3, tile, tile)), "maps": (np.float32, (2, 3))}

    def encode(image: torch.Tensor) -> torch.Tensor:
        with autocast():
            return base.encode(image[None].to(base.device) * 2 - 1)[0].float().cpu()

    def make(chunk: int) -> Batch:
        pairs, maps = [], []
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, size)):
            rng = np.random.default_rng([config.train.seed, 4, i])
            photo = photos[i % len(photos)]
            square = draw_square(photo.shape[-2:], rng, ZOOM)
            # Restoration enlarges small images to a tile, so small crops are degraded before they are enlarged.
            hq = resize_square(cut_square(photo, square), min(square.side, tile))
            lq = degrade(hq, reduced(level, config.largest_sf, rng), rng)
            pairs.append(torch.stack([resize_square(image, tile) for image in (hq, lq)]))
            maps.append(face_in_square(faces[i % len(photos)], photo.shape[-2:], square))
        return {"pairs": torch.stack(pairs), "maps": torch.from_numpy(np.stack(maps))}

    def finish(chunk: Batch) -> dict[str, npt.NDArray[Any]]:
        pairs = chunk["pairs"]
        made = {"latents": torch.stack([torch.stack([encode(image) for image in pair]) for pair in pairs]).numpy()}
        if "images" in arrays:
            made["images"] = pairs.mul(255).round().byte().numpy()
            made["maps"] = chunk["maps"].numpy()
        return made

    samples = Samples("crops", arrays, size, min(CHUNK, size), f"{mark} {size}", make, finish)
    found = make_arrays(samples, work, on_progress)
    hq, lq = torch.from_numpy(found["latents"]).unbind(1)
    references = torch.stack([encode(center_crop(photo, tile)) for photo in photos])
    pool = LatentPool(hq, lq, torch.arange(size) % len(photos), references)
    if "images" not in found:
        return pool
    return pool._replace(images=torch.from_numpy(found["images"]), maps=np.asarray(found["maps"]))


def face_in_square(face: npt.NDArray[np.float32], size: Sequence[int], square: Square) -> npt.NDArray[np.float32]:
    """Return the position (2, 3) of a photograph's face in a square of it, NaN where the square cuts the face.

    face: `face_map` of a photograph of `size` (height and width), NaN without a face.
    """
    ratio = np.array([size[1], size[0]]) / square.side
    found = face * ratio[:, None]
    found[:, 2] += ratio - 2 * np.array([square.left, square.top]) / square.side - 1
    if square.flip:  # the face that the recognizer gets is flipped too
        found = found * [[1, -1, -1], [-1, 1, 1]]
    reach = np.abs(found[:, 2]) + FACE * np.abs(found[:, :2]).sum(1)
    return found.astype(np.float32) if (reach <= 1).all() else NO_FACE


def reduced(level: DegradationConfig, largest: float, rng: np.random.Generator) -> DegradationConfig:
    """Return a level with a random reduction up to `largest`; a level with a larger reduction stays as it is."""
    return replace(level, sf=rng.uniform(level.sf, largest)) if largest > level.sf else level


def pool_size(config: PersonalizeConfig) -> int:
    """Return the number of samples in the pool: a short training makes only the samples that it uses."""
    return min(config.pool, config.train.iterations * config.train.batch)


class BatchMaker:
    """Makes batches: random photographs are the references, and the samples come from the others.

    PFStorer section 3.3 has one reference.
    """

    def __init__(self, pool: LatentPool, config: PersonalizeConfig) -> None:
        self.pool, self.config = pool, config

    def __call__(self, iteration: int, number: int) -> Batch:
        """Return latents `hq lq noise` (B, C, h, w) and `reference` (R, C, h, w), `t` (B,), `self` bool ().

        `photos` (R,) are the numbers of the references.
        """
        seed, batch, pool = self.config.train.seed, self.config.train.batch, self.pool
        rng = np.random.default_rng([seed, 6, number])
        photos = self.draw_references(rng)
        chosen = torch.from_numpy(rng.choice(self.squares_without(photos), batch))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        noise = torch.randn(pool.hq[chosen].shape, generator=generator)
        t = draw_timesteps(batch, self.config.first_step, generator)
        # All processes draw the same value, because they have to run the same graph.
        use_self = np.random.default_rng([seed, 5, iteration]).random() < self.share_without_reference()
        return {
            "hq": pool.hq[chosen],
            "lq": pool.lq[chosen],
            "reference": pool.references[torch.from_numpy(photos)],
            "photos": torch.from_numpy(photos),
            "noise": noise,
            "t": t,
            "self": torch.tensor(use_self),
            **self.image_inputs(chosen, rng),
        }

    def image_inputs(self, chosen: torch.Tensor, rng: np.random.Generator) -> Batch:
        """Return inputs of image-space losses: `hq_image lq_image` (B, 3, H, W) in [-1, 1], `maps`, `corner`."""
        if self.pool.images is None or self.pool.maps is None:
            return {}
        hq, lq = self.pool.images[chosen].transpose(0, 1) / 127.5 - 1
        return {"hq_image": hq, "lq_image": lq, **draw_views(self.pool.maps[chosen.numpy()], hq.shape[-1], rng)}

    def share_without_reference(self) -> float:
        """Return the share of the iterations without a reference."""
        return 1.0 if self.config.ref_source == "self" else self.config.p_self

    def draw_references(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Draw the numbers of 1 to `references` photographs; one photograph at least is left for the samples."""
        photos = len(self.pool.references)
        most = max(1, min(self.config.references, photos - 1))
        count = int(rng.integers(1, most + 1)) if most > 1 else 1
        return rng.choice(photos, count, replace=False)

    def squares_without(self, photos: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the numbers of the samples of other photographs, or of all samples if there are no others."""
        others = np.flatnonzero(~np.isin(self.pool.photo.numpy(), photos))
        return others if len(others) else np.arange(len(self.pool.hq))
