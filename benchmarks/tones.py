"""Measure the restoration of grey, tinted and faded images.

    python benchmarks/tones.py real=FOLDER generated=FOLDER --lpips FILE --recognizer FILE --landmarks FILE -o tones.csv

Folders, references, test images and seeds are those of `benchmarks/people.py`. Each degraded image is changed
(`CHANGES`), restored, and changed back; a grey result is compared with the grey original. The input `usual` is the
degraded image without the change: its result is the limit, for `grey` turned grey. `changed` is the default of
`restore`, where the networks see the image with other tones. `unaltered` shows them the changed image, as `restore
--colorize` does. One row per person, image, method, change and input. People in the CSV file are not measured again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from common import hwc, machine, measuring, read, rounded, write
from heldout import cosine_to, metric
from people import REFERENCES, SEED, crops, learned, people_of

from pfstorer_rt.config import PersonalizeConfig, RestoreConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.imaging.bands import Grey
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.models.base import load_base
from pfstorer_rt.runtime.restorer import Restorer


def grey(pixels: Pixels) -> Pixels:
    """Return the luma of (H, W, 3) in every channel."""
    return np.repeat((pixels @ Grey.WEIGHTS)[..., None], 3, 2)


def changed(pixels: Pixels, gain: tuple[float, ...], black: float) -> Pixels:
    """Multiply the channels of (H, W, 3) and add `black`."""
    values: Pixels = (pixels * np.array(gain) + black).clip(0, 1).astype(np.float32)
    return values


def undone(pixels: Pixels, gain: tuple[float, ...], black: float) -> Pixels:
    """Undo `changed`."""
    values: Pixels = ((pixels - black) / np.array(gain)).clip(0, 1).astype(np.float32)
    return values


class Change(NamedTuple):
    """A change of an image, and what makes a result comparable with the original, which `seen` changes too."""

    change: Callable[[Pixels], Pixels]
    back: Callable[[Pixels], Pixels]
    seen: Callable[[Pixels], Pixels]


def tint(*gain: float, black: float = 0.0) -> Change:
    """Return the change by factors of red, green and blue."""
    return Change(partial(changed, gain=gain, black=black), partial(undone, gain=gain, black=black), np.asarray)


CHANGES = {
    "grey": Change(grey, grey, grey),
    "yellow": tint(1.15, 0.92, 0.7),
    "blue": tint(0.75, 1.0, 1.2),
    "faded and yellow": tint(0.575, 0.46, 0.35, black=0.3),
    "dark": tint(0.35, 0.35, 0.35),
}
INPUTS = ("usual", "changed", "unaltered")


@click.command()
@click.argument("sets", nargs=-1, required=True, metavar="NAME=FOLDER...")
@measuring(side=512)
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
            lq, original = hwc(degrade(truth, "heavy", SEED + number)), hwc(truth)
            for method, restorer in methods.items():
                usual = restorer.restore(lq)
                for change, (forward, back, seen) in CHANGES.items():
                    for kind in INPUTS:
                        config = RestoreConfig(colorize=kind == "unaltered")
                        result = seen(usual) if kind == "usual" else back(restorer.restore(forward(lq), config))
                        values = {column: rounded(value(result, seen(original))) for column, value in metrics.items()}
                        about = {"set": name, "person": person.name, "image": number, "method": method}
                        about |= {"change": change, "input": kind}
                        rows.append({**about, **values, "learn_cpu_s": seconds, "side": len(lq), **machine()})
        write(output, rows)
        click.echo(f"{name} {person.name}")


if __name__ == "__main__":
    main()
