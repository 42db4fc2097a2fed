"""Measure the shipped base with and without identities, on people who are in no training.

    python benchmarks/people.py real=FOLDER generated=FOLDER --lpips FILE --recognizer FILE -o people.csv

Each FOLDER has one folder of photographs per person. The first five by name are the references. `--tests` further
photographs are cropped to the centre, reduced to `--side` pixels or to the smallest of them, heavily degraded, each
with its own seed, and restored. One row per person, method and image. `gradient` is the metric `sharpness` of
`pfstorer-rt evaluate`, and `cosine` is a hundredth of `id_original_arcface`. `learn_cpu_s` is the processor time of the
personalization. People in the CSV file are not measured again, so the same command resumes an interrupted run.
`--readme` writes the table of means to README.md and measures nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from common import hwc, machine, read, replace_table, rounded, write
from heldout import cosine_to, metric, save_sheet
from portrait_tables import people_table as table

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.data import center_crop, read_photo
from pfstorer_rt.training.personalize import personalize

REFERENCES = 5
SEED = 500
METHODS = {"input": "Input", "base": "Base", "pfstorer": "PFStorer"}


@click.command()
@click.argument("sets", nargs=-1, metavar="NAME=FOLDER...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", default="portrait", show_default=True)
@click.option("--people", default=3, show_default=True, help="Number of people of each set, the first by name.")
@click.option("--tests", default=6, show_default=True, help="Number of images of each person.")
@click.option("--side", default=512, show_default=True)
@click.option("--lpips", type=click.Path(exists=True, path_type=Path))
@click.option("--recognizer", type=click.Path(exists=True, path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Folder for a sheet of images of each person.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Page whose table to replace.")
def main(
    sets: tuple[str, ...],
    output: Path,
    base: str,
    people: int,
    tests: int,
    side: int,
    lpips: Path | None,
    recognizer: Path | None,
    sheet: Path | None,
    readme: Path | None,
) -> None:
    rows = read(output)
    if readme:
        replace_table(readme, "people.py", table(rows))
        return
    if not lpips or not recognizer:
        raise click.UsageError("give --lpips FILE and --recognizer FILE")
    metrics = {
        "psnr": metric("psnr"),
        "lpips": metric("lpips", lpips=lpips),
        "gradient": metric("sharpness"),
        "cosine": cosine_to(recognizer),
    }
    loaded = load_base(base)
    for name, person in people_of(sets, people):
        if any((row["set"], row["person"]) == (name, person.name) for row in rows):
            continue
        shown = []
        for number, results, seconds in restored(person, loaded, tests, side):
            truth = results.pop("truth")
            for method, result in results.items():
                values = {key: rounded(metric(result, truth)) for key, metric in metrics.items()}
                about = {"set": name, "person": person.name, "image": number, "method": METHODS[method]}
                rows.append({**about, **values, "learn_cpu_s": seconds, "side": len(truth), **machine()})
            shown.append([*results.values(), truth])
        write(output, rows)
        if sheet is not None:
            save_sheet(sheet / f"{name}_{person.name}.jpg", shown[:4])
        click.echo(f"{name} {person.name}: learned in {seconds} s of processor time")


def people_of(sets: Sequence[str], most: int | None = None) -> Iterator[tuple[str, Path]]:
    """Yield the name of a set and the folder of a person; sets: NAME=FOLDER. most: people of each set, None is all."""
    for text in sets:
        name, folder = text.split("=", 1)
        for person in sorted(path for path in Path(folder).iterdir() if path.is_dir())[:most]:
            yield name, person


def restored(person: Path, base: Base, tests: int, side: int) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Learn a person, and yield the number of each image, its versions, and the seconds of learning."""
    paths = find_images([person])
    personal, seconds = learned(paths[:REFERENCES], base, PersonalizeConfig.for_base(base.config))
    plain = Restorer.from_base(base)
    for number, truth in enumerate(crops(paths[REFERENCES : REFERENCES + tests], side)):
        lq = hwc(degrade(truth, "heavy", SEED + number))
        images = {"input": lq, "base": plain.restore(lq), "pfstorer": personal.restore(lq), "truth": hwc(truth)}
        yield number, images, seconds


def learned(references: Sequence[Path], base: Base, config: PersonalizeConfig) -> tuple[Restorer, int]:
    """Learn a person; returns the restorer with the identity, and the seconds of processor time."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        file = Path(folder) / "person.safetensors"
        personalize("person", references, base, config, file)
        return Restorer.from_base(base, file), round(time.process_time() - started)


def crops(paths: Sequence[Path], side: int) -> list[torch.Tensor]:
    """Read photographs as central squares (3, S, S) in [0, 1] of one size, at most `side` pixels."""
    photos = [read_photo(path) for path in paths]
    side = min(side, *(min(photo.shape[-2:]) for photo in photos))
    return [center_crop(photo, side) for photo in photos]


if __name__ == "__main__":
    main()
