"""Measure a base on held-out photographs: its autoencoder alone, and restoration by number of steps.

    python benchmarks/base.py PHOTOS... -o benchmarks/results/base.csv

Uses only the photographs that `train-base` holds out by name. One row per setting; values are means over the images.
`faces` is the share of the images in which dlib finds a face. `id_distance` is the mean over the images in which dlib
finds a face in every setting, so that all rows cover the same images.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import hwc, machine

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.faces.dlib import identity_distance
from pfstorer_rt.faces.finding import face_embedder
from pfstorer_rt.imaging.files import from_tensor, to_tensor
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.imaging.similarity import psnr, ssim
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.crops import CropConfig, split_holdout
from pfstorer_rt.training.data import center_crop, read_photo

LEVELS = ("light", "heavy", "clean")
"""`clean` uses the original photograph as the input."""
SETTINGS = [("ddim", 1), ("ddim", 2), ("ddim", 4), ("ddim", 8), ("ddim", 50)]


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", "name", default="portrait", show_default=True)
@click.option("--count", default=48, show_default=True, help="Number of held-out images, evenly spaced.")
@click.option("--level", type=click.Choice(LEVELS), multiple=True, default=LEVELS, show_default=True)
def main(photos: tuple[Path, ...], output: Path, name: str, count: int, level: tuple[str, ...]) -> None:
    base = load_base(name)
    _, held = split_holdout(find_images(photos), CropConfig().holdout)
    chosen = held[:: max(1, len(held) // count)][:count]
    originals = [center_crop(read_photo(path), base.config.tile) for path in chosen]
    rows = [row for one in level for row in measure(base, originals, one)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        click.echo("  ".join(f"{k} {row[k]}" for k in ("level", "method", "psnr", "ssim", "faces", "id_distance")))


def measure(base: Base, originals: list[torch.Tensor], level: str) -> list[dict[str, Any]]:
    """Restore every image with every setting; returns one row of means per setting."""
    embed = face_embedder()
    assert embed is not None, "install the metrics extra"
    truths = [hwc(image) for image in originals]
    clean = level == "clean"
    inputs = [hwc(image if clean else degrade(image, level, i)) for i, image in enumerate(originals)]
    results: dict[str, list[Pixels]] = {"input": inputs, "autoencoder": [reconstruct(base, t) for t in truths]}
    with Restorer.from_base(base) as restorer:
        for sampler, steps in SETTINGS:
            config = RestoreConfig(sampler=sampler, steps=steps)
            results[f"{sampler} {steps}"] = [restorer.restore(lq, config) for lq in inputs]
    known = [embed(t) for t in truths]
    distances = {
        method: [identity_distance(embed(p), k) for p, k in zip(images, known, strict=True)]
        for method, images in results.items()
    }
    common = [i for i in range(len(truths)) if all(d[i] is not None for d in distances.values())]

    def mean(metric: Callable[[Pixels, Pixels], float], images: list[Pixels]) -> float:
        return float(np.mean([metric(p, t) for p, t in zip(images, truths, strict=True)]))

    return [
        {
            "level": level,
            "method": method,
            "pictures": len(truths),
            "psnr": round(min(99.0, mean(psnr, images)), 2),
            "ssim": round(mean(ssim, images), 3),
            "faces": round(np.mean([d is not None for d in distances[method]]).item(), 3),
            "id_distance": round(float(np.mean([distances[method][i] for i in common])), 3) if common else "",
            "id_pictures": len(common),
            "base": base.fingerprint[:12],
            **machine(),
        }
        for method, images in results.items()
    ]


@torch.no_grad()
def reconstruct(base: Base, pixels: Pixels) -> Pixels:
    """Encode and decode an image (3, H, W) in [0, 1]."""
    return from_tensor(base.decode(base.encode(to_tensor(pixels))))


if __name__ == "__main__":
    main()
