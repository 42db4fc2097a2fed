"""Train the shipped base and its prior on one GPU, on tiles that are made on the GPU during the training.

    python benchmarks/train_portrait.py -o OUT --people FOLDER --portraits FOLDER --photos FOLDER=0.7 \
        --photos FOLDER=0.3 --generator MODULE.py WEIGHTS --lpips lpips_vgg16.npz --minutes 8

`--people` contains one folder of at least two photographs per person. Photographs of people and portraits must be
square and aligned as the FFHQ data set; `--photos` may have any size and content. The generator is optional and not
part of this project: `MODULE.load(weights, device, dtype)` returns an object with the method of
`pfstorer_rt.training.photo_store.PeopleGenerator`. OUT becomes a base directory. OUT.work has the losses by stage (CSV)
and the checkpoints. The same command resumes an interrupted training.
"""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from pfstorer_rt.faces.dlib import RECOGNIZER, face_models
from pfstorer_rt.faces.recognizer import FaceRecognizer
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import load_base
from pfstorer_rt.progress import StageProgress
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.people import find_people
from pfstorer_rt.training.photo_store import GeneratedPeople, Photographs, PhotoStore, read_store
from pfstorer_rt.training.tile_pool import parse_source
from pfstorer_rt.training.view_stages import ViewStagesConfig, train_on_views, with_minutes

FIRST_PEOPLE, AT_ONCE = 0.25, 20
"""Share of the generated people that are made before the training, and people generated in one call."""
REPORT = 50
"""Iterations between two lines of output."""


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--prior", "name", default="portrait", show_default=True, help="Base with which the training starts.")
@click.option("--people", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--portraits", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--photos", multiple=True, required=True, metavar="FOLDER[=WEIGHT]")
@click.option("--generator", nargs=2, metavar="MODULE.py WEIGHTS", type=click.Path(exists=True, path_type=Path))
@click.option("--generated", default=800, show_default=True, help="Generated people in memory.")
@click.option("--per-person", default=6, show_default=True, help="Images of each generated person.")
@click.option("--side", default=1024, show_default=True, help="Side in pixels of the generated images.")
@click.option("--lpips", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--discriminator", type=click.Path(exists=True, path_type=Path), help="Checkpoint with a discriminator.")
@click.option("--minutes", default=8.0, show_default=True, help="Duration of the stages, without reading photographs.")
@click.option("--iterations", type=int, help="Iterations of every stage, instead of the duration.")
@click.option("--batch", default=64, show_default=True)
@click.option("--tiles", default=1500, show_default=True, help="Tiles composed from the photographs.")
@click.option("--workers", default=8, show_default=True, help="Processes that read photographs.")
@click.option("--only-joint", is_flag=True, help="Only the last stage: the autoencoder stays as it is.")
@click.option("--graphs", is_flag=True, help="Replay the last stage's iterations as CUDA graphs.")
def main(
    output: Path,
    name: str,
    people: tuple[Path, ...],
    portraits: tuple[Path, ...],
    photos: tuple[str, ...],
    generator: tuple[Path, Path] | None,
    generated: int,
    per_person: int,
    side: int,
    lpips: Path,
    discriminator: Path | None,
    minutes: float,
    iterations: int | None,
    batch: int,
    tiles: int,
    workers: int,
    only_joint: bool,
    graphs: bool,
) -> None:
    weights = face_models()
    if weights is None:
        raise click.ClickException("the identity loss needs dlib's recognizer; install the extra metrics")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    base = load_base(name)
    files = Photographs(
        find_people(people), find_images(portraits) if portraits else [], [parse_source(text) for text in photos]
    )
    begun = time.monotonic()

    def open_store(device: torch.device) -> PhotoStore:
        made = None if generator is None else generate(generator, device, generated, per_person, side)
        store = read_store(files, base.config.tile, tiles, device, made, workers)
        click.echo(f"{time.monotonic() - begun:.0f} s: {len(store.photos)} photographs, {len(store.tiles)} tiles")
        return store

    networks = Lpips(lpips), FaceRecognizer(weights / RECOGNIZER)
    work = output.with_name(output.name + ".work")
    start = replace(ViewStagesConfig(), graphs=graphs)
    if only_joint:
        start = replace(start, autoencoder=None)
    config = settings(with_minutes(start, minutes, not base.instant), iterations, batch)
    train_on_views(open_store, base, work, config, *networks, discriminator, partial(report, begun))
    base.save(output, torch.float16)
    click.echo(f"{time.monotonic() - begun:.0f} s: {output} is complete")


def settings(config: ViewStagesConfig, iterations: int | None, batch: int) -> ViewStagesConfig:
    """Return the settings with a batch, and with a number of iterations of every stage in place of the duration."""
    changes: dict[str, Any] = {"batch": batch, **({"iterations": iterations, "minutes": 0.0} if iterations else {})}
    first, joint = config.autoencoder, config.joint
    if first is not None:
        first = replace(first, train=replace(first.train, **changes), patches=max(1, batch // 2))
    return replace(
        config,
        autoencoder=first,
        matching=replace(config.matching, **changes),
        joint=replace(joint, base=replace(joint.base, train=replace(joint.base.train, **changes))),
    )


def generate(files: tuple[Path, Path], device: torch.device, count: int, per_person: int, side: int) -> GeneratedPeople:
    """Load a generator from its module and weights, and generate the first people."""
    module, weights = files
    spec = importlib.util.spec_from_file_location(module.stem, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    network = loaded.load(str(weights), device, torch.float16 if device.type == "cuda" else torch.float32)
    images = torch.empty((count, per_person, 3, side, side), dtype=torch.uint8, device=device)
    people = GeneratedPeople(network, images)
    while people.made < FIRST_PEOPLE * count:
        people.refill(min(AT_ONCE, count))
    return people


def report(begun: float, progress: StageProgress) -> None:
    """Print the progress of a stage now and then."""
    if progress.done % REPORT == 1 and math.isfinite(progress.loss):
        click.echo(f"{time.monotonic() - begun:.0f} s: {progress.stage} {progress.done}, loss {progress.loss:.4f}")


if __name__ == "__main__":
    main()
