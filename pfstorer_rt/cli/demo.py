"""`pfstorer-rt demo`: the whole path on scikit-image's public-domain portrait."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from pfstorer_rt.cli.options import SEED
from pfstorer_rt.console import say
from pfstorer_rt.extras import needed_by

Pixels = npt.NDArray[np.float32]
FACE = (20, 116, 216)
"""Row, column and side in pixels of the portrait's head in scikit-image's astronaut."""
NAME = "astronaut"
WORDS = (
    "identity distance: dlib embedding to the undegraded portrait; under 0.6 counts as the same person,",
    "a dash: no face was found",
    "What this shows: every step works, and what the identity adds to the base here.",
    "What this does not show: a fair test. There is one public-domain portrait, so the references are other crops,",
    "mirrorings and exposures of the same photograph. Expect less with other photographs. With the default seed a",
    "face is found in the results; with another --seed the base alone may fail to restore one.",
)


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder of the results.",
)
@click.option("--base", default="tiny", show_default=True, help="Base: tiny, or a base directory.")
@click.option(
    "--iterations",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="Iterations of the personalization; `personalize` uses 1000.",
)
@click.option(
    "--level",
    type=click.Choice(["light", "heavy"]),
    default="heavy",
    show_default=True,
    help="Strength of the degradation.",
)
@click.option("--seed", type=SEED, default=4, show_default=True, help="Random seed of the degradation.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def command(output: Path, base: str, iterations: int, level: str, seed: int, as_json: bool) -> None:
    """Degrade a portrait, learn it from other views, export, restore, and show all side by side.

    \b
    Example:
      pfstorer-rt demo -o demo
    """
    tell = partial(say, err=as_json)
    started = time.perf_counter()
    truth, lq, references = make_pictures(output, level, seed)
    tell(f"{output}: {len(references)} views of the portrait, and the {level} degraded input")
    plan = output / f"{NAME}.plan"
    learn_and_export(references, base, iterations, output, plan)
    tell(f"{plan}: learned and exported after {time.perf_counter() - started:.0f} s")
    pictures = {"input": lq, **restore_both(lq, plan), "ground truth": truth}
    figures = measure(pictures, references)
    save(output, pictures, figures)
    if as_json:
        say(json.dumps({"figures": figures, "seconds": round(time.perf_counter() - started, 1)}))
        return
    say(f"{'':<14}{'PSNR':>8}{'identity distance':>20}")
    for name, row in figures.items():
        say(f"{name:<14}{show(row['psnr'], 'dB'):>8}{show(row['id_distance']):>20}")
    for line in WORDS:
        say(line)
    say(f"{output / 'side_by_side.png'}: all images side by side, after {time.perf_counter() - started:.0f} s")


def make_pictures(output: Path, level: str, seed: int) -> tuple[Pixels, Pixels, list[Path]]:
    """Write the truth, the degraded input and the reference views; returns them and their paths."""
    import torch

    with needed_by("demo", "all"):  # before anything is written
        from skimage.data import astronaut

        import pfstorer_rt.export
        import pfstorer_rt.training.personalize  # noqa: F401

    from pfstorer_rt.degradation.degrade import degrade
    from pfstorer_rt.imaging.files import save_image

    portrait = (astronaut() / 255).astype(np.float32)
    row, column, side = FACE
    truth = resize(portrait[row : row + side, column : column + side], 192)
    lq = degrade(torch.from_numpy(truth).permute(2, 0, 1).contiguous(), level, seed).permute(1, 2, 0).numpy()
    folder = output / "references"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, view in enumerate(views(portrait)):
        paths.append(folder / f"view_{i + 1}.png")
        save_image(paths[-1], view, overwrite=True)
    return truth, lq, paths


def views(portrait: Pixels) -> list[Pixels]:
    """Return five other views: shifted and scaled crops, mirrored, at other exposures and warmths."""
    row, column, side = FACE
    crops = ((-20, -20, 40), (-4, 10, -24), (6, -16, 4), (-20, 2, 20), (10, 4, -30))
    gains = ((0.8, 0.8, 0.85), (1.15, 1.1, 1.0), (0.95, 1.0, 1.1), (1.0, 1.0, 1.0), (0.7, 0.72, 0.75))
    result = []
    for i, ((dy, dx, ds), gain) in enumerate(zip(crops, gains, strict=True)):
        y, x, s = max(0, row + dy), max(0, column + dx), side + ds
        view = np.clip(portrait[y : y + s, x : x + s] * np.array(gain, np.float32), 0, 1)
        result.append(np.ascontiguousarray(view[:, ::-1] if i % 2 else view))
    return result


def resize(pixels: Pixels, size: int) -> Pixels:
    """Resize a square picture."""
    from pfstorer_rt.imaging.files import from_tensor, resize_bicubic, to_tensor

    return from_tensor(resize_bicubic(to_tensor(pixels), (size, size), antialias=True))


def learn_and_export(references: list[Path], base: str, iterations: int, output: Path, plan: Path) -> None:
    """Personalize on the views and write the plan."""
    from pfstorer_rt.config import PersonalizeConfig
    from pfstorer_rt.console import stage_bars
    from pfstorer_rt.export import export_plan
    from pfstorer_rt.models.base import load_base
    from pfstorer_rt.training.personalize import personalize

    loaded = load_base(base)
    config = PersonalizeConfig.for_base(loaded.config, {"iterations": iterations})
    with stage_bars() as on_progress:
        file = output / f"{NAME}.safetensors"
        identity = personalize(NAME, references, loaded, config, file, on_progress=on_progress)
    export_plan(plan, identity, loaded)


def restore_both(lq: Pixels, plan: Path) -> dict[str, Pixels]:
    """Restore with the identity and, at strength 0, with the base alone."""
    from pfstorer_rt.config import RestoreConfig
    from pfstorer_rt.runtime.restorer import Restorer

    with Restorer.from_plan(plan) as restorer:
        return {
            "base": restorer.restore(lq, RestoreConfig(strength=0.0)),
            "personalized": restorer.restore(lq, RestoreConfig()),
        }


def measure(pictures: dict[str, Pixels], references: list[Path]) -> dict[str, dict[str, float | None]]:
    """Return PSNR and identity distance of each picture to the ground truth; None where there is no figure."""
    from pfstorer_rt.faces.dlib import identity_distance
    from pfstorer_rt.faces.finding import face_embedder
    from pfstorer_rt.imaging.similarity import psnr

    embed = face_embedder()
    truth = pictures["ground truth"]
    face = embed(truth) if embed else None
    return {
        name: {
            "psnr": None if pixels is truth else round(psnr(pixels, truth), 2),
            "id_distance": round(d, 3) if embed and (d := identity_distance(embed(pixels), face)) is not None else None,
        }
        for name, pixels in pictures.items()
    }


def show(value: float | None, unit: str = "") -> str:
    """Format a figure, a dash where there is none."""
    return "-" if value is None else f"{value:g} {unit}".strip()


def save(output: Path, pictures: dict[str, Pixels], figures: dict[str, Any]) -> None:
    """Write every picture, the side-by-side and the figures."""
    from PIL import Image, ImageDraw, ImageFont

    from pfstorer_rt.imaging.files import save_image

    names = {"personalized": "restored", "ground truth": "truth"}
    for name, pixels in pictures.items():
        save_image(output / f"{names.get(name, name)}.png", pixels, overwrite=True)
    side, gap, foot = 288, 8, 48
    sheet = Image.new("RGB", (len(pictures) * (side + gap) + gap, side + gap + foot), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (name, pixels) in enumerate(pictures.items()):
        left = gap + i * (side + gap)
        picture = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, gap))
        row = figures[name]
        text = f"PSNR {show(row['psnr'], 'dB')}, identity {show(row['id_distance'])}"
        draw.text((left, side + gap + 4), name, fill="black", font=font)
        draw.text((left, side + gap + 24), text if name != "ground truth" else "", fill="dimgray", font=font)
    sheet.save(output / "side_by_side.png")
    (output / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
