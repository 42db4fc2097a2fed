"""Measure the restoration of grey images, with the networks seeing them in skin tones and in grey.

    python benchmarks/grey.py real=FOLDER generated=FOLDER --lpips FILE --recognizer FILE --landmarks FILE -o grey.csv

Folders, references, test images and seeds are those of `benchmarks/people.py`. The degraded images and the originals
are turned grey. `colour` restores the degraded image in colour and turns the result grey. `grey` is the default of
`restore`. `unchanged` shows the networks the grey image, as `restore --colorize` does, and turns the result grey. One
row per person, image, method and input. People in the CSV file are not measured again.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from common import hwc, machine, read, rounded, write
from heldout import cosine_to, metric
from people import REFERENCES, SEED, crops, learned, people_of

from pfstorer_rt.config import PersonalizeConfig, RestoreConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.imaging.bands import Grey
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.models.base import load_base
from pfstorer_rt.runtime.restorer import Restorer

INPUTS = ("colour", "grey", "unchanged")


@click.command()
@click.argument("sets", nargs=-1, required=True, metavar="NAME=FOLDER...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", default="portrait", show_default=True)
@click.option("--tests", default=6, show_default=True, help="Number of images of each person.")
@click.option("--side", default=512, show_default=True)
@click.option("--lpips", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--recognizer", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--landmarks", required=True, type=click.Path(exists=True, path_type=Path))
def main(
    sets: tuple[str, ...],
    output: Path,
    base: str,
    tests: int,
    side: int,
    lpips: Path,
    recognizer: Path,
    landmarks: Path,
) -> None:
    metrics = {
        "psnr": metric("psnr"),
        "lpips": metric("lpips", lpips=lpips),
        "lmse_98": metric("lmse_98", landmarks=landmarks),
        "identity": cosine_to(recognizer),
    }
    loaded, rows = load_base(base), read(output)
    for name, person in people_of(sets):
        if any((row["set"], row["person"]) == (name, person.name) for row in rows):
            continue
        paths = find_images([person])
        personal, seconds = learned(paths[:REFERENCES], loaded, PersonalizeConfig.for_base(loaded.config))
        methods = {"Base": Restorer.from_base(loaded), "PFStorer": personal}
        for number, truth in enumerate(crops(paths[REFERENCES : REFERENCES + tests], side)):
            lq = hwc(degrade(truth, "heavy", SEED + number))
            for method, restorer in methods.items():
                for kind in INPUTS:
                    result = grey(restored(restorer, lq, kind))
                    values = {column: rounded(value(result, grey(hwc(truth)))) for column, value in metrics.items()}
                    about = {"set": name, "person": person.name, "image": number, "method": method, "input": kind}
                    rows.append({**about, **values, "learn_cpu_s": seconds, "side": len(lq), **machine()})
        write(output, rows)
        click.echo(f"{name} {person.name}")


def grey(pixels: Pixels) -> Pixels:
    """Return the luma of (H, W, 3) in every channel."""
    return np.repeat((pixels @ Grey.WEIGHTS)[..., None], 3, 2)


def restored(restorer: Restorer, lq: Pixels, kind: str) -> Pixels:
    """Restore a degraded image (H, W, 3) as one of `INPUTS`."""
    if kind == "colour":
        return restorer.restore(lq)
    return restorer.restore(grey(lq), RestoreConfig(colorize=kind == "unchanged"))


if __name__ == "__main__":
    main()
