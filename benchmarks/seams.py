"""Measure visible tile borders, number of tiles and time, by tiling mode and overlap.

    python benchmarks/seams.py --engine portrait.plan -o benchmarks/results/seams.csv [--steps 2] [--size 768]

Images: a sky (a flat gradient), skin (a smooth cheek of scikit-image's public-domain portrait, enlarged) and texture
(stationary pink noise), each degraded by blur and noise. `seam` is the mean gradient across tile borders divided by the
mean gradient at all other multiples of 8 pixels, because decoders leave a grid of 8 pixels; 1 is invisible.
`seam_input` is the same ratio in the input. `psnr_to_parity` compares with StableSR's tiling with an overlap of half a
tile. Seconds are the time of a whole restoration; `denoiser_tiles` counts the tiles of one step.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from common import machine, write
from scipy.ndimage import gaussian_filter, zoom
from seam_ratio import seam_ratio

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.imaging.similarity import psnr
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.tiling import Tile

Pixels = npt.NDArray[np.float32]


@click.command()
@click.option("--engine", required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--backend", default="auto")
@click.option("--size", default=768, show_default=True)
@click.option("--steps", type=int)
def main(engine: str, output: Path, backend: str, size: int, steps: int | None) -> None:
    rows = []
    with Restorer.from_plan(engine, backend) as restorer:
        m = restorer.manifest
        step = m.factor
        fast = [TileConfig(overlap=o) for o in dict.fromkeys(m.tile // n // step * step for n in (2, 4, 8))]
        for name, pixels in samples(size).items():
            parity = None
            for tile in (TileConfig("parity"), *fast, TileConfig(overlap=0)):
                config = RestoreConfig(steps=steps, tile=tile)
                started = time.perf_counter()
                result = restorer.restore(pixels, config)
                seconds = time.perf_counter() - started
                parity = result if parity is None else parity
                layout = restorer.layout(size, size, config)
                tiles = [Tile(*(step * side for side in t)) for t in layout.tiles]
                rows.append(
                    {
                        "picture": name,
                        "size": size,
                        "tiling": tile.mode,
                        "overlap": layout.recipe.overlap,
                        "seam": round(seam_ratio(result, tiles, step), 4),
                        "seam_input": round(seam_ratio(pixels, tiles, step), 4),
                        "psnr_to_parity": round(min(99.0, psnr(result, parity)), 2),
                        "denoiser_tiles": layout.denoiser_tiles,
                        "codec_tiles": layout.codec_tiles,
                        "seconds": round(seconds, 2),
                        "steps": layout.recipe.steps,
                        "backend": restorer.backend,
                        **machine(),
                    }
                )
                click.echo("  ".join(f"{k} {v}" for k, v in list(rows[-1].items())[:10]))
    write(output, rows)


def samples(size: int) -> dict[str, Pixels]:
    """Return the degraded images, (size, size, 3) in [0, 1]."""
    from skimage.data import astronaut

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    sky = np.stack([0.45 + 0.1 * y, 0.6 + 0.08 * y, 0.85 + 0.05 * y + 0 * x], -1)
    cheek = astronaut()[140:180, 200:240] / 255
    skin = zoom(cheek, (size / 40, size / 40, 1), order=3)[:size, :size]
    waves = np.fft.rfft2(rng.standard_normal((size, size, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])[..., None]
    texture = np.fft.irfft2(waves / np.maximum(frequency, 1 / size), (size, size), axes=(0, 1))
    texture = 0.5 + 0.15 * texture / texture.std()
    clean = {"sky": sky, "skin": skin, "texture": texture}
    blurred = {name: gaussian_filter(p, (1.5, 1.5, 0)) for name, p in clean.items()}
    return {n: np.clip(p + rng.normal(0, 0.02, p.shape), 0, 1).astype(np.float32) for n, p in blurred.items()}


if __name__ == "__main__":
    main()
