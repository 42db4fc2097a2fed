"""Compare the time of a large image with the time of its tiles.

    python benchmarks/tiled.py --engine portrait.plan -o benchmarks/results/tiled.csv [--runs 7]

`tile_s` is the median time of an image of one tile, `picture_s` of the large image, both from pixels to pixels. `ratio`
is the median over the rounds of (time of the large image / its number of tiles) divided by the time of one tile in the
same round. 1 means that tiling has no overhead; below 1, tiles are faster in batches. A tile is one tile of the
denoiser with its share of encoder and decoder.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import numpy as np
from common import machine, write
from peers import sample

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.runtime.restorer import Restorer


@click.command()
@click.option("--engine", "engines", required=True, multiple=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--backend", "backends", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--size", "sizes", multiple=True, type=int, default=(1280, 2560), show_default=True)
@click.option("--batch", default=TileConfig().batch, show_default=True, help="Tiles per batch.")
@click.option("--runs", default=7, show_default=True)
def main(
    engines: tuple[str, ...], output: Path, backends: tuple[str, ...], sizes: tuple[int, ...], batch: int, runs: int
) -> None:
    rows = []
    for engine in engines:
        for backend in backends:
            with Restorer.from_plan(engine, backend) as restorer:
                rows += [{**measure(restorer, size, batch, runs), **machine()} for size in sizes]
            for row in rows[-len(sizes) :]:
                click.echo("  ".join(f"{k} {v}" for k, v in list(row.items())[:9]))
    write(output, rows)


def measure(restorer: Restorer, size: int, batch: int, runs: int) -> dict[str, object]:
    """Restore one tile and one large image, alternating."""
    config, side = RestoreConfig(tile=TileConfig(batch=batch)), restorer.manifest.tile
    small, large = sample(side)[1], sample(size)[1]
    tiles = restorer.layout(size, size, config).denoiser_tiles
    times: dict[str, list[float]] = {"tile": [], "image": []}
    for i in range(runs + 1):
        for name, pixels in (("tile", small), ("image", large)):
            seconds = clock(restorer, pixels, config)
            if i:  # the first round compiles
                times[name].append(seconds)
    ratios = [b / tiles / a for a, b in zip(times["tile"], times["image"], strict=True)]
    return {
        "provider": restorer.provider,
        "precision": restorer.manifest.precision,
        "size": size,
        "tiles": tiles,
        "batch": batch,
        "tile_s": round(float(np.median(times["tile"])), 4),
        "picture_s": round(float(np.median(times["image"])), 3),
        "ratio": round(float(np.median(ratios)), 3),
        "runs": runs,
        "load": round(os.getloadavg()[0], 1),
    }


def clock(restorer: Restorer, pixels: Pixels, config: RestoreConfig) -> float:
    """Return the time of a restoration in seconds."""
    started = time.perf_counter()
    restorer.restore(pixels, config)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
