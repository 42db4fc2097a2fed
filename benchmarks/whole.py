"""Restore composed images with faces of 60 to 1,200 pixels, in one pass of tiles and coarse to fine.

    python benchmarks/whole.py FOLDER... --lpips FILE -o whole.csv

The folders contain portraits of one face each; every scene takes the next portraits that are large enough. A scene is
reduced by the scale, degraded, and restored at this scale. `heavy` and `light` are the levels of `pfstorer-rt degrade`;
`scan` is `heavy` at half the size, enlarged, like a scan with more pixels than the print has detail.

One row per scene and method: `input` is the degraded image, enlarged by bicubic interpolation; `tiles` has coarse to
fine off; `coarse` is the default. Columns: PSNR in dB; LPIPS (AlexNet, ONNX: `in0`, `in1` in [-1, 1]); `lpips_face`,
LPIPS after a reduction to a largest face of 256 pixels; `sharpness`, the mean gradient divided by the original's;
`faces_original` and `faces`, the numbers of faces that dlib finds in the original and in the result. `--page`
writes the table of means to a page and restores nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
import torch
from common import hwc, line, machine, read, replace_table, write
from heldout import metric
from scenes import MATERIALS, Portrait, Scene, Spot, compose

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.faces.finding import find_boxes
from pfstorer_rt.imaging.files import from_tensor, resize_bicubic, to_tensor
from pfstorer_rt.imaging.find import find_images
from pfstorer_rt.imaging.rows import Pixels, Spool, from_pixels
from pfstorer_rt.imaging.similarity import mean_gradient, psnr
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.data import read_photo

METHODS = {"input": "input", "tiles": "tiles (`--coarse off`)", "coarse": "coarse to fine"}
COLUMNS = {
    "PSNR dB ↑": ("psnr", 2),
    "LPIPS ↓": ("lpips", 3),
    "LPIPS, face reduced to 256 pixels ↓": ("lpips_face", 3),
    "sharpness": ("sharpness", 2),
}
"""Column of the table on the page -> column of the CSV file and its decimals."""
FACE = 256
"""Side of the largest face in pixels for `lpips_face`."""
LEVELS = ("heavy", "light", "scan")
SINGLE = (60, 90, 130, 200, 300, 420, 520, 600, 680, 760, 860, 1000, 1200)
"""Sides of the faces of scenes with one face."""


def single(side: int, number: int, scale: int = 1) -> Scene:
    """Return a scene with one face; its sides are multiples of the scale."""
    width = max(400, round((1.45 if side < 1000 else 1.25) * side))
    width, height = (n - n % scale for n in (width, round(1.2 * width)))
    return Scene(f"one_{side}", width, height, materials(number), (Spot(0.5, 0.47, side),))


def group(sides: tuple[int, ...], width: int, height: int, number: int) -> Scene:
    """Return a scene with faces side by side."""
    places = (np.cumsum(sides) - np.array(sides) / 2) / sum(sides)
    spots = (Spot(float(x), 0.45 + 0.06 * (n % 2), side) for n, (x, side) in enumerate(zip(places, sides, strict=True)))
    return Scene(f"group_{'_'.join(map(str, sides))}", width, height, materials(number), tuple(spots))


def materials(number: int) -> str:
    """Return the name of the material of scene `number`."""
    return list(MATERIALS)[number % len(MATERIALS)]


SCENES: list[tuple[Scene, int]] = [
    *((single(side, n), 1) for n, side in enumerate(SINGLE)),
    (group((60,) * 5, 620, 400, 1), 1),
    (group((90, 70, 110, 80), 760, 520, 2), 1),
    (group((130, 150, 140), 900, 560, 3), 1),
    (group((220, 180), 900, 700, 4), 1),
    (group((180,) * 4, 1100, 600, 5), 1),
    (group((240, 200, 220), 1000, 700, 0), 1),
    (group((320, 300), 1300, 900, 5), 1),
    (group((480, 420), 1600, 1000, 0), 1),
    (group((650, 140), 1400, 1200, 1), 1),
    (group((760, 90), 1400, 1300, 3), 1),
    (Scene("portrait_900", 1500, 2000, "wall", (Spot(0.5, 0.45, 900),)), 1),
    *((Scene(name, 900, 900, name, ()), 1) for name in MATERIALS),
    *((single(side, n, 2), 2) for n, side in enumerate((200, 300, 420, 640, 860))),
    (group((300, 340), 1200, 800, 2), 2),
    *((single(side, n, 4), 4) for n, side in enumerate((360, 560, 760))),
    (group((260, 300, 240), 1400, 800, 3), 4),
]


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--lpips", type=click.Path(exists=True, path_type=Path))
@click.option("--base", default="portrait", show_default=True)
@click.option("--only", help="Restore only the scenes whose name contains this text.")
@click.option("--first", default=0, show_default=True, help="Number of the first scene that is restored.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder for all images.")
@click.option("--page", type=click.Path(exists=True, path_type=Path), help="Page whose table to replace.")
def main(
    folders: tuple[str, ...],
    output: Path,
    lpips: Path | None,
    base: str,
    only: str | None,
    first: int,
    images: Path | None,
    page: Path | None,
) -> None:
    if page:
        replace_table(page, "whole.py", table(read(output)))
        return
    if not folders or not lpips:
        raise click.UsageError("give FOLDER... and --lpips FILE")
    portraits = list(read_portraits(folders))
    restorer, distance = Restorer.from_base(base), metric("lpips", lpips=lpips)
    rows: list[dict[str, Any]] = []
    for number, (scene, scale) in enumerate(SCENES):
        if number < first or (only and only not in scene.name):
            continue
        original = compose(scene, chosen(portraits, scene, number), number)
        level = LEVELS[number % len(LEVELS)]
        lq = degraded(reduced(original, 1 / scale), level, number)
        count = len(find_boxes(original))
        for method, (result, facts) in results(restorer, lq, scale, original.shape[:2]).items():
            values = measure(result, original, scene, distance)
            about = {"scene": scene.name, "level": level, "scale": scale, "method": method}
            row = {**about, **values, "faces_original": count, "faces": len(find_boxes(result)), **facts, **machine()}
            rows.append(row)
            click.echo("  ".join(f"{k} {v}" for k, v in list(row.items())[:11]))
            if images is not None:
                save(images / f"{number:02d}_{scene.name}_x{scale}_{level}_{method}.png", result)
        if images is not None:
            save(images / f"{number:02d}_{scene.name}_x{scale}_{level}_original.png", original)
        write(output, rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the means over the scenes that had two passes, by method."""
    scenes = {(row["scene"], row["scale"], row["level"]) for row in rows if row["coarse_scale"]}
    lines = [line(["", *COLUMNS]), line(["---"] * (1 + len(COLUMNS)))]
    for method, name in METHODS.items():
        mine = [r for r in rows if r["method"] == method and (r["scene"], r["scale"], r["level"]) in scenes]
        means = [fmean(float(row[key]) for row in mine) for key, _ in COLUMNS.values()]
        lines.append(line([name, *(f"{m:.{d}f}" for m, (_, d) in zip(means, COLUMNS.values(), strict=True))]))
    return "\n".join(lines) + "\n"


def results(
    restorer: Restorer, lq: Pixels, scale: int, shape: tuple[int, ...]
) -> dict[str, tuple[Pixels, dict[str, Any]]]:
    """Return the image and the facts of every method; a method that equals `tiles` is not computed again."""
    made = {"input": (sized(lq, shape), {"seconds": 0.0, "coarse_scale": ""})}
    source = Spool.of(from_pixels(lq))
    for method, coarse in (("tiles", "off"), ("coarse", "auto")):
        config = RestoreConfig(scale=scale, coarse=coarse)  # type: ignore[arg-type]
        chosen_scale = restorer.passes(source, config).facts().get("coarse_scale", "")
        if method == "coarse" and not chosen_scale:
            made[method] = made["tiles"]
            continue
        started = time.perf_counter()
        image = restorer.restore(lq, config)
        made[method] = image, {"seconds": round(time.perf_counter() - started, 2), "coarse_scale": chosen_scale}
    return made


def measure(result: Pixels, original: Pixels, scene: Scene, distance: Callable[..., Any]) -> dict[str, Any]:
    """Return all distances of a result to its original."""
    ratio = min(1.0, FACE / max((spot.side for spot in scene.spots), default=FACE))
    near = distance(result, original)
    face = distance(reduced(result, ratio), reduced(original, ratio)) if ratio < 1 else near
    sharpness = mean_gradient(result) / mean_gradient(original)
    values = {"psnr": psnr(result, original), "lpips": near, "lpips_face": face, "sharpness": sharpness}
    return {name: round(value, 4) for name, value in values.items()}


def read_portraits(folders: tuple[str, ...]) -> Iterator[Portrait]:
    """Yield the photographs in which the detector finds one face."""
    for path in find_images([Path(folder) for folder in folders]):
        pixels = hwc(read_photo(path))
        found = find_boxes(pixels)
        if len(found) == 1:
            yield Portrait(pixels, found[0])


def chosen(portraits: list[Portrait], scene: Scene, number: int) -> list[Portrait]:
    """Return a portrait for every face of a scene: large enough, or else among the largest."""
    largest = max(portrait.face.side for portrait in portraits)
    picked = []
    for place, spot in enumerate(scene.spots):
        fitting = [p for p in portraits if p.face.side >= min(spot.side, 0.8 * largest)]
        picked.append(fitting[(5 * number + place) % len(fitting)])
    return picked


def degraded(pixels: Pixels, level: str, seed: int) -> Pixels:
    """Degrade an image with a level of `LEVELS`."""
    if level == "scan":
        return sized(degraded(reduced(pixels, 0.5), "heavy", seed), pixels.shape[:2]).clip(0, 1)
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return hwc(degrade(image, level, seed)).clip(0, 1)


def reduced(pixels: Pixels, scale: float) -> Pixels:
    """Resize an image by a factor."""
    return sized(pixels, tuple(max(1, round(n * scale)) for n in pixels.shape[:2]))


def sized(pixels: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Resize an image to (height, width) by bicubic interpolation."""
    size = (shape[0], shape[1])
    return from_tensor(resize_bicubic(to_tensor(pixels), size, antialias=size[0] < pixels.shape[0]))


def save(path: Path, pixels: Pixels) -> None:
    """Save an image."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
