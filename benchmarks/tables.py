"""Measure the paper's tables on people outside all training data.

    python benchmarks/tables.py PEOPLE -o benchmarks/results/tables.csv --document docs/results.md

PEOPLE has one folder of photographs per person. The first five by name are the references. `--tests` further
photographs are cropped to the base's tile, degraded, each with its own seed, and restored. One row per person, method
and image. Rows in the CSV file are not measured again, so the same command resumes an interrupted run.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from common import LARGEST_PSNR, hwc, machine
from tables_document import write_document

from pfstorer_rt.config import WITHOUT_IMAGE_LOSSES, PersonalizeConfig, RestoreConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.evaluation.registry import Metrics, load_metrics
from pfstorer_rt.evaluation.sample import Sample
from pfstorer_rt.identity import Identity
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.models.base import Base, load_base
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.data import center_crop, read_photo
from pfstorer_rt.training.personalize import personalize

METRICS = ("psnr", "ssim", "stlpips", "lmse_dlib", "id_dlib", "id_original_dlib", "verification_dlib")
LEVELS = ("heavy", "light", "clean")
"""`clean` uses the original as the input, to check that a restoration preserves the identity."""


@dataclass(frozen=True)
class Method:
    """One row of a table: the settings of an identity's training and of the restoration."""

    learn: Mapping[str, Any] | None = None
    """Fields of `PersonalizeConfig`, and `iterations`; None restores with the base alone."""
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    ablation: bool = False


LATENTS = {"first_step": 0.0, **WITHOUT_IMAGE_LOSSES}
"""The papers' objectives, which use latents only; the defaults of a base can add image-space losses."""
SHORT = {**LATENTS, "iterations": 500}
"""Settings of the ablations' training, with half of the default iterations of `tiny`."""
METHODS: dict[str, Method] = {
    "Base": Method(),
    "Base + DreamBooth": Method({"method": "dreambooth", **LATENTS}),
    "Base + ViCo": Method({"method": "vico", **LATENTS}),
    "PFStorer, latents alone": Method(LATENTS),
    "PFStorer": Method({}),
    "PFStorer, strength 1.5": Method({}, RestoreConfig(strength=1.5), ablation=True),
    "PFStorer, 2 steps": Method({}, RestoreConfig(steps=2), ablation=True),
    "PFStorer, 4 steps": Method({}, RestoreConfig(steps=4), ablation=True),
    "PFStorer, 8 steps": Method({}, RestoreConfig(steps=8), ablation=True),
    "PFStorer, 50 steps": Method({}, RestoreConfig(steps=50), ablation=True),
    "Base, 2 steps": Method(restore=RestoreConfig(steps=2), ablation=True),
    "Base, 4 steps": Method(restore=RestoreConfig(steps=4), ablation=True),
    "Base, 8 steps": Method(restore=RestoreConfig(steps=8), ablation=True),
    "Base, 50 steps": Method(restore=RestoreConfig(steps=50), ablation=True),
    "500 iterations": Method(SHORT, ablation=True),
    "500 iterations, lambda_gen 0.1": Method({**SHORT, "lambda_gen": 0.1}, ablation=True),
    "500 iterations, lambda_gen 1": Method({**SHORT, "lambda_gen": 1.0}, ablation=True),
    "500 iterations, self": Method({**SHORT, "ref_source": "self"}, ablation=True),
    "500 iterations, ViCo": Method({**SHORT, "method": "vico"}, ablation=True),
}
"""PFStorer without image-space losses and ViCo differ only in gamma (paper, ablation). Rows without another method's
name are PFStorer; rows with `500 iterations` have no image-space losses."""
Row = dict[str, Any]


class Person:
    """Photographs of one person, and the identities trained on them in this run."""

    def __init__(self, folder: Path, tests: int, base: Base, iterations: int) -> None:
        self.name, photos = folder.name, find_images([folder])
        self.references, self.tests = photos[:5], photos[5 : 5 + tests]
        self.base, self.iterations = base, iterations
        self.known = [Sample(hwc(self.square(path))) for path in self.references]
        self._learned: dict[str, tuple[Identity, float]] = {}

    def square(self, path: Path) -> torch.Tensor:
        """Crop a photograph to its centre and resize it to the base's tile."""
        return center_crop(read_photo(path), self.base.config.tile)

    def identity(self, learn: Mapping[str, Any]) -> tuple[Identity, float]:
        """Train an identity once; returns it and the CPU time in seconds."""
        if (key := repr(learn)) not in self._learned:
            settings = dict(learn)
            iterations = settings.pop("iterations", self.iterations)
            given = {"iterations": iterations} if iterations else {}
            config = PersonalizeConfig.for_base(self.base.config, given, **settings)
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                identity = personalize("one", self.references, self.base, config, Path(folder) / "one.safetensors")
            self._learned[key] = identity, time.process_time() - start
        return self._learned[key]

    def pairs(self, level: str) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (number, input, original), each (3, tile, tile) in [0, 1]."""
        for i, path in enumerate(self.tests):
            hq = self.square(path)
            yield i, hq if level == "clean" else degrade(hq, level, i), hq


def measure(person: Person, name: str, level: str, metrics: Metrics, shared: Row) -> list[Row]:
    """Restore and measure all images of a person with one method."""
    method = METHODS.get(name, Method())
    identity, seconds = (None, 0.0) if method.learn is None else person.identity(method.learn)
    iterations = "" if identity is None else identity.settings["train"]["iterations"]
    rows = []
    with Restorer.from_base(person.base, identity) as restorer:
        for i, lq, hq in person.pairs(level):
            start = time.perf_counter()
            result = hwc(lq) if name == "Input" else restorer.restore(hwc(lq), method.restore)
            took = time.perf_counter() - start
            figures = metrics.measure(Sample(result), Sample(hwc(hq)), person.known)
            rounded = {key: "" if (v := figures[key]) is None else round(min(v, LARGEST_PSNR), 4) for key in METRICS}
            rows.append(
                {
                    "person": person.name,
                    "method": name,
                    "level": level,
                    "picture": i,
                    **rounded,
                    "seconds": round(took, 3),
                    "learn_cpu_s": round(seconds, 1),
                    "iterations": iterations,
                    **shared,
                }
            )
    return rows


def read(path: Path) -> list[Row]:
    """Read the rows of an earlier run."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """Write all rows in sorted order, independently of the order of measurement."""
    order = {name: i for i, name in enumerate(["Input", *METHODS])}
    rows.sort(key=lambda r: (LEVELS.index(r["level"]), order.get(r["method"], 99), r["person"], int(r["picture"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@click.command()
@click.argument("people", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", default="benchmarks/results/tables.csv", type=click.Path(path_type=Path))
@click.option("--document", type=click.Path(path_type=Path), help="Markdown page to write from the rows.")
@click.option("--base", "base_name", default="portrait", show_default=True)
@click.option(
    "--method", "names", multiple=True, type=click.Choice(["Input", *METHODS]), help="Measure only these methods."
)
@click.option("--person", "chosen", multiple=True, help="Measure only these people.")
@click.option("--tests", default=8, show_default=True, help="Test images of each person.")
@click.option("--iterations", default=0, help="Iterations of personalizing; 0 is the default.")
@click.option("--level", "levels", multiple=True, type=click.Choice(LEVELS), default=LEVELS, show_default=True)
def main(
    people: Path,
    output: Path,
    document: Path | None,
    base_name: str,
    names: tuple[str, ...],
    chosen: tuple[str, ...],
    tests: int,
    iterations: int,
    levels: tuple[str, ...],
) -> None:
    base, rows = load_base(base_name), read(output)
    shared = {"base": base.fingerprint[:12], **machine()}
    metrics = load_metrics(METRICS)
    for refused in metrics.refused.values():
        raise click.ClickException(refused)
    done = {(r["person"], r["method"], r["level"]) for r in rows}
    for folder in sorted(p for p in people.iterdir() if p.is_dir() and (not chosen or p.name in chosen)):
        person = Person(folder, tests, base, iterations)
        for name in names or ("Input", *METHODS):
            for level in levels:
                if (person.name, name, level) not in done and wanted(name, level):
                    rows += measure(person, name, level, metrics, shared)
                    write(output, rows)
                    click.echo(f"{person.name} {name}, {level}: {len(rows)} rows", err=True)
    if document:
        write_document(document, read(output), output)


def wanted(name: str, level: str) -> bool:
    """Whether a method is part of a level's table: ablations run on heavily degraded images only."""
    return level == "heavy" or not METHODS.get(name, Method()).ablation


if __name__ == "__main__":
    main()
