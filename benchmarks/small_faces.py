"""Measure bases with and without identities on small faces, which fill at most a 192-pixel image.

    python benchmarks/small_faces.py real=FOLDER generated=FOLDER --base portrait --thorough \\
        --lpips FILE --recognizer FILE --landmarks FILE -o small_faces.csv

Folders, references, and test images are those of `benchmarks/people.py`, with `--side` 192. `--thorough` learns as
`personalize --thorough`. One row per person, image, base and method. Another call with another base adds its rows.
People of a base and a method that are in the CSV file are not measured again.
"""

from __future__ import annotations

from pathlib import Path

import click
from common import hwc, machine, measuring, read, rounded, write
from heldout import cosine_to, metric
from people import REFERENCES, SEED, crops, learned, people_of

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import load_base
from pfstorer_rt.runtime.restorer import Restorer


@click.command()
@click.argument("sets", nargs=-1, required=True, metavar="NAME=FOLDER...")
@measuring(side=192)
@click.option("--thorough", is_flag=True)
def main(
    sets: tuple[str, ...],
    output: Path,
    base: str,
    thorough: bool,
    tests: int,
    side: int,
    lpips: Path,
    recognizer: Path,
    landmarks: Path,
) -> None:
    metrics = {
        "psnr": metric("psnr"),
        "lpips": metric("lpips", lpips=lpips),
        "sharpness": metric("sharpness"),
        "lmse_98": metric("lmse_98", landmarks=landmarks),
        "identity": cosine_to(recognizer),
    }
    loaded = load_base(base)
    config = PersonalizeConfig.for_base(loaded.config)
    method = "thorough" if thorough else "default"
    rows = read(output)
    for name, person in people_of(sets):
        key = {"set": name, "person": person.name, "base": loaded.config.name, "learning": method}
        if any(all(row[column] == value for column, value in key.items()) for row in rows):
            continue
        paths = find_images([person])
        personal, seconds = learned(paths[:REFERENCES], loaded, config.thorough() if thorough else config)
        plain = Restorer.from_base(loaded)
        for number, truth in enumerate(crops(paths[REFERENCES : REFERENCES + tests], side)):
            lq = hwc(degrade(truth, "heavy", SEED + number))
            images = {"Input": lq, "Base": plain.restore(lq), "PFStorer": personal.restore(lq)}
            for shown, image in images.items():
                values = {column: rounded(value(image, hwc(truth))) for column, value in metrics.items()}
                rows.append({**key, "image": number, "method": shown, **values, "learn_cpu_s": seconds, **machine()})
        write(output, rows)
        click.echo(f"{name} {person.name}: learned in {seconds} s of processor time")


if __name__ == "__main__":
    main()
