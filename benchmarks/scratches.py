"""Measure `--remove-scratches` with the base alone: one row per image, level, damage and setting.

    python benchmarks/scratches.py real=FOLDER generated=FOLDER --lpips FILE --recognizer FILE -o scratches.csv

The images are cropped and degraded as in `heldout.py`; the level `clean` is not degraded. Then lines, spots and a
crease are drawn on them, by other code than in the training (`pfstorer_rt.degradation.scratches`). Rows without damage
show what the setting changes in an image that has no scratches.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from common import hwc, machine, read, write
from heldout import Case, cosine_to, metric, read_cases, save_sheet
from PIL import Image, ImageDraw

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.models.base import load_base
from pfstorer_rt.runtime.restorer import Restorer

FINER = 4
"""Marks are drawn at this multiple of the resolution."""
SETTINGS = {"default": RestoreConfig(), "remove_scratches": RestoreConfig(remove_scratches=True)}


@click.command()
@click.argument("sets", nargs=-1, required=True, metavar="NAME=FOLDER...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", default="portrait", show_default=True)
@click.option("--count", default=8, show_default=True, help="Number of images of each set, evenly spaced.")
@click.option("--lpips", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--recognizer", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Folder for a sheet of images of each set and level.")
def main(
    sets: tuple[str, ...], output: Path, base: str, count: int, lpips: Path, recognizer: Path, sheet: Path | None
) -> None:
    rows = read(output)
    done = {(row["set"], row["level"], int(row["image"]), row["damage"]) for row in rows}
    metrics = {"psnr": metric("psnr"), "lpips": metric("lpips", lpips=lpips), "cosine": cosine_to(recognizer)}
    restorer = Restorer.from_base(load_base(base))
    sheets: dict[tuple[str, str], list[list[Pixels]]] = {}
    for case in (case for text in sets for case in read_cases(*text.split("=", 1), ("clean", "light", "heavy"), count)):
        original = hwc(case.original)
        for damage in ("none", "scratches"):
            if (*case.key, damage) in done:
                continue
            image = case.input() if damage == "none" else scratched(case)
            results = {setting: restorer.restore(image, config) for setting, config in SETTINGS.items()}
            for setting, result in {"input": image, **results}.items():
                values = {name: measure(result, original) for name, measure in metrics.items()}
                figures = {name: "" if v is None else round(v, 4) for name, v in values.items()}
                about = {"set": case.set, "level": case.level, "image": case.number, "damage": damage}
                rows.append({**about, "setting": setting, **figures, "side": len(original), **machine()})
            if damage == "scratches":
                sheets.setdefault(case.key[:2], []).append([image, *results.values(), original])
            write(output, rows)
    if sheet:
        for (name, level), images in sheets.items():
            save_sheet(sheet / f"{name}_{level}.jpg", images[:4])


def scratched(case: Case) -> Pixels:
    """Return the degraded image of a case with scratches, spots and a crease."""
    rng, image = np.random.default_rng([7, case.number]), case.input()
    side = len(image)
    marks = Image.new("L", (side * FINER, side * FINER))
    draw = ImageDraw.Draw(marks)

    def width() -> int:
        return max(1, round(FINER * side / 512 * rng.uniform(1, 5)))

    for _ in range(4):
        start, bend, end = rng.uniform(0, side * FINER, (3, 2))
        t = np.linspace(0, 1, 40)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end  # a quadratic Bézier curve
        draw.line([(float(x), float(y)) for x, y in curve], 255, width())
    for x, y in rng.uniform(0, side * FINER, (14, 2)):
        radius = width() * rng.uniform(0.4, 1.2)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], 230)
    across = rng.uniform(0.2, 0.8) * side * FINER
    draw.line([(0, across), (side * FINER, across + rng.normal(0, 60))], 160, width())
    opacity = np.asarray(marks.reduce(FINER), np.float32)[..., None] / 255
    color = np.float32([0.93, 0.91, 0.86] if rng.random() < 0.7 else [0.12, 0.1, 0.09])
    return np.ascontiguousarray(image + opacity * (color - image))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
