"""Measure bases on whole held-out images: one row per input and base.

    python benchmarks/heldout.py london=FOLDER generated=FOLDER --lpips FILE --recognizer FILE -o heldout.csv

The images of each folder are cropped to the centre, resized to 512 pixels, and degraded, each with its own seed. The
input is the degraded image, enlarged to 512 pixels by bicubic interpolation. Columns: PSNR in dB; LPIPS (AlexNet, ONNX:
`in0`, `in1` in [-1, 1]); `gradient`, the mean gradient of the result divided by the original's; `cosine`, the cosine
similarity of a recognizer's embeddings (ONNX, RGB 0..255, 112x112 ArcFace template) of result and original. Both are
aligned by the landmarks of the original, so that results without a detectable face count too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from common import hwc, machine, write

from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.faces.arcface import align, five_points
from pfstorer_rt.faces.finding import find_largest, landmarks_at_side
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.imaging.similarity import mean_gradient, psnr
from pfstorer_rt.models.base import load_base
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.data import center_crop, read_photo

SIDE = 512
Metric = Callable[[Pixels, Pixels], float | None]


@click.command()
@click.argument("sets", nargs=-1, required=True, metavar="NAME=FOLDER...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", "bases", multiple=True, default=("portrait",), show_default=True)
@click.option(
    "--level",
    "levels",
    type=click.Choice(["heavy", "light", "clean"]),
    multiple=True,
    default=("heavy", "light", "clean"),
)
@click.option("--count", default=24, show_default=True, help="Number of images of each set, evenly spaced.")
@click.option("--lpips", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--recognizer", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Folder for a sheet of images of each set and level.")
def main(
    sets: tuple[str, ...],
    output: Path,
    bases: tuple[str, ...],
    levels: tuple[str, ...],
    count: int,
    lpips: Path,
    recognizer: Path,
    sheet: Path | None,
) -> None:
    metrics: dict[str, Metric] = {
        "psnr": psnr,
        "lpips": lpips_distance(lpips),
        "gradient": gradient_ratio,
        "cosine": cosine_to(recognizer),
    }
    originals = {}
    for text in sets:
        name, folder = text.split("=", 1)
        paths = find_images([Path(folder)])
        originals[name] = [center_crop(read_photo(p), SIDE) for p in paths[:: max(1, len(paths) // count)][:count]]
    restorers = {name: Restorer.from_base(load_base(name)) for name in bases}
    rows: list[dict[str, Any]] = []
    for name, images in originals.items():
        for level in levels:
            shown = []
            for number, image in enumerate(images):
                lq = image if level == "clean" else degrade(image, level, 1000 + number)
                results: dict[str, Pixels] = {"input": hwc(lq)}
                seconds = {"input": 0.0}
                for base, restorer in restorers.items():
                    started = time.perf_counter()
                    results[base] = restorer.restore(hwc(lq))
                    seconds[base] = time.perf_counter() - started
                for method, result in results.items():
                    values = {key: metric(result, hwc(image)) for key, metric in metrics.items()}
                    rows.append(
                        {
                            "set": name,
                            "level": level,
                            "picture": number,
                            "method": Path(method).name,
                            **{k: "" if v is None else round(v, 4) for k, v in values.items()},
                            "seconds": round(seconds[method], 2),
                            **machine(),
                        }
                    )
                shown.append([*results.values(), hwc(image)])
            if sheet is not None:
                save_sheet(sheet / f"{name}_{level}.jpg", shown[:4])
            tell(rows, name, level, list(metrics))
    write(output, rows)


def tell(rows: list[dict[str, Any]], name: str, level: str, columns: list[str]) -> None:
    """Print the means of one set and level."""
    chosen = [row for row in rows if row["set"] == name and row["level"] == level]
    for method in dict.fromkeys(row["method"] for row in chosen):
        mine = [row for row in chosen if row["method"] == method]
        known = {c: [row[c] for row in mine if row[c] != ""] for c in columns}
        click.echo(f"{name} {level} {method:<10} " + "  ".join(f"{c} {np.mean(v):.3f}" for c, v in known.items()))


def lpips_distance(path: Path) -> Metric:
    """Return LPIPS computed with an ONNX file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def distance(result: Pixels, truth: Pixels) -> float:
        planes = [p.transpose(2, 0, 1)[None].astype(np.float32) * 2 - 1 for p in (result, truth)]
        return float(np.ravel(session.run(None, dict(zip(("in0", "in1"), planes, strict=True)))[0])[0])

    return distance


def gradient_ratio(result: Pixels, truth: Pixels) -> float:
    """Return the mean absolute difference of neighbouring pixels, divided by the original's."""
    return mean_gradient(result) / mean_gradient(truth)


def cosine_to(path: Path) -> Metric:
    """Return a metric: the cosine similarity of embeddings, None when the original shows no face."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def embed(pixels: Pixels, points: Any) -> Any:
        planes = align(pixels, points).transpose(2, 0, 1)[None].astype(np.float32) * 255
        vector = np.ravel(session.run(None, {name: planes})[0])
        return vector / np.linalg.norm(vector)

    def cosine(result: Pixels, truth: Pixels) -> float | None:
        box = find_largest(truth)
        if box is None:
            return None
        points = five_points(landmarks_at_side(truth, box))
        return float(embed(result, points) @ embed(truth, points))

    return cosine


def save_sheet(path: Path, rows: list[list[Pixels]]) -> None:
    """Save images side by side, a row per image: input, bases, original."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows])
    Image.fromarray((sheet.clip(0, 1) * 255).round().astype(np.uint8)).save(path, quality=90)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
