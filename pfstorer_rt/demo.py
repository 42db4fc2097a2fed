"""The demo: degrade a public-domain portrait, learn it from other views, export, restore, and measure the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pfstorer_rt.config import PersonalizeConfig, RestoreConfig
from pfstorer_rt.extras import needed_by
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.progress import OnProgress, ignore_progress

FACE = (20, 116, 216)
"""Row, column and side in pixels of the head in scikit-image's portrait `astronaut`."""
NAME = "astronaut"
SIDE = 192
"""Side of the degraded image and of the results, in pixels."""
TRUTH = "ground truth"
FILES = {"input": "input.png", "base": "base.png", "personalized": "restored.png", TRUTH: "truth.png"}
"""Name of an image -> its file."""


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo."""

    base: str | Path = "tiny"
    """Name of a shipped base, or a base directory."""
    iterations: int = 300
    """Iterations of the personalization."""
    level: Literal["light", "heavy"] = "heavy"
    """Strength of the degradation."""
    seed: int = 4
    """Random seed of the degradation."""


@dataclass(frozen=True)
class DemoImage:
    """One image of the demo: `input`, `base` (restored without the identity), `personalized` or `ground truth`."""

    name: str
    file: Path
    psnr: float | None
    """PSNR to the ground truth in dB; None for the ground truth itself."""
    id_distance: float | None
    """Distance of dlib's embeddings to the ground truth; None where no face was found."""


@dataclass(frozen=True)
class DemoReport:
    """Files and measurements of a demo."""

    images: tuple[DemoImage, ...]
    side_by_side: Path
    """All images in one file."""
    plan: Path
    seconds: float

    @property
    def figures(self) -> dict[str, dict[str, float | None]]:
        """Return name of an image -> its measurements."""
        return {image.name: {"psnr": image.psnr, "id_distance": image.id_distance} for image in self.images}


def run_demo(
    output: Path,
    config: DemoConfig | None = None,
    note: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress = ignore_progress,
) -> DemoReport:
    """Run every step on scikit-image's portrait and write all files to the folder `output`; files there are replaced.

    The references are other crops, mirrorings and exposures of the same photograph, so the result is optimistic.
    note: called with a line after each part. Raises `MissingBackendError` when a package of the extra `all` is missing,
    before anything is written.
    """
    config, started = config or DemoConfig(), time.perf_counter()
    portrait = load_portrait()
    truth, lq = degraded_face(portrait, config)
    references = write_views(portrait, output / "references")
    note(f"{output}: {len(references)} views of the portrait, and the {config.level} degraded input")
    plan = learn_and_export(references, output, config, on_progress)
    note(f"{plan}: learned and exported after {time.perf_counter() - started:.0f} s")
    results = {"input": lq, **restore_both(lq, plan), TRUTH: truth}
    images = write_images(output, results)
    report = DemoReport(images, output / "side_by_side.png", plan, time.perf_counter() - started)
    draw_sheet(report, results)
    (output / "results.json").write_text(json.dumps(report.figures, indent=2) + "\n")
    return report


def load_portrait() -> Pixels:
    """Return scikit-image's portrait (H, W, 3) in [0, 1], after checking that every step of the demo is installed."""
    with needed_by("demo", "all"):
        from skimage.data import astronaut

        import pfstorer_rt.export
        import pfstorer_rt.training.personalize  # noqa: F401

    return (astronaut() / 255).astype(np.float32)


def degraded_face(portrait: Pixels, config: DemoConfig) -> tuple[Pixels, Pixels]:
    """Return the face of the portrait and its degraded image, both (192, 192, 3) in [0, 1]."""
    from pfstorer_rt.degradation.degrade import degrade

    row, column, side = FACE
    truth = resize_square(portrait[row : row + side, column : column + side], SIDE)
    image = torch.from_numpy(truth).permute(2, 0, 1).contiguous()
    return truth, degrade(image, config.level, config.seed).permute(1, 2, 0).numpy()


def write_views(portrait: Pixels, folder: Path) -> list[Path]:
    """Write the reference views to a folder and return their files."""
    from pfstorer_rt.imaging.files import save_image

    make_folder(folder)
    paths = []
    for number, view in enumerate(views(portrait), start=1):
        paths.append(folder / f"view_{number}.png")
        save_image(paths[-1], view, overwrite=True)
    return paths


def views(portrait: Pixels) -> Iterator[Pixels]:
    """Yield five other views of the face: shifted and scaled crops, mirrored, at other exposures and warmths."""
    row, column, side = FACE
    crops = ((-20, -20, 40), (-4, 10, -24), (6, -16, 4), (-20, 2, 20), (10, 4, -30))
    gains = ((0.8, 0.8, 0.85), (1.15, 1.1, 1.0), (0.95, 1.0, 1.1), (1.0, 1.0, 1.0), (0.7, 0.72, 0.75))
    for i, ((dy, dx, ds), gain) in enumerate(zip(crops, gains, strict=True)):
        y, x, s = max(0, row + dy), max(0, column + dx), side + ds
        view = np.clip(portrait[y : y + s, x : x + s] * np.array(gain, np.float32), 0, 1)
        yield np.ascontiguousarray(view[:, ::-1] if i % 2 else view)


def resize_square(pixels: Pixels, side: int) -> Pixels:
    """Resize a square image (s, s, 3) in [0, 1] to (side, side, 3)."""
    from pfstorer_rt.imaging.files import from_tensor, resize_bicubic, to_tensor

    return from_tensor(resize_bicubic(to_tensor(pixels), (side, side), antialias=True))


def learn_and_export(references: list[Path], output: Path, config: DemoConfig, on_progress: OnProgress) -> Path:
    """Learn an identity from the views, export it, and return the file of the plan."""
    from pfstorer_rt.export import export_plan
    from pfstorer_rt.models.base import load_base
    from pfstorer_rt.training.personalize import personalize

    base = load_base(config.base)
    settings = PersonalizeConfig.for_base(base.config, {"iterations": config.iterations})
    file, plan = output / f"{NAME}.safetensors", output / f"{NAME}.plan"
    identity = personalize(NAME, references, base, settings, file, on_progress=on_progress)
    export_plan(plan, identity, base)
    return plan


def restore_both(lq: Pixels, plan: Path) -> dict[str, Pixels]:
    """Restore an image with the identity and, at strength 0, with the base alone."""
    from pfstorer_rt.runtime.restorer import Restorer

    with Restorer.from_plan(plan) as restorer:
        return {
            "base": restorer.restore(lq, RestoreConfig(strength=0.0)),
            "personalized": restorer.restore(lq, RestoreConfig()),
        }


def write_images(output: Path, results: dict[str, Pixels]) -> tuple[DemoImage, ...]:
    """Write the images and measure each of them against the ground truth."""
    from pfstorer_rt.faces.dlib import identity_distance
    from pfstorer_rt.faces.finding import face_embedder
    from pfstorer_rt.imaging.files import save_image
    from pfstorer_rt.imaging.similarity import psnr

    embed, truth = face_embedder(), results[TRUTH]
    faces = {name: embed(pixels) if embed else None for name, pixels in results.items()}
    images = []
    for name, pixels in results.items():
        save_image(output / FILES[name], pixels, overwrite=True)
        distance = identity_distance(faces[name], faces[TRUTH])
        decibels = None if name == TRUTH else round(psnr(pixels, truth), 2)
        images.append(DemoImage(name, output / FILES[name], decibels, None if distance is None else round(distance, 3)))
    return tuple(images)


def draw_sheet(report: DemoReport, results: dict[str, Pixels]) -> None:
    """Write all images side by side, with their names and measurements."""
    from PIL import Image, ImageDraw, ImageFont

    side, gap, foot = 288, 8, 48
    sheet = Image.new("RGB", (len(results) * (side + gap) + gap, side + gap + foot), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, image in enumerate(report.images):
        left = gap + i * (side + gap)
        tile = Image.fromarray((results[image.name] * 255 + 0.5).astype(np.uint8))
        sheet.paste(tile.resize((side, side), Image.Resampling.LANCZOS), (left, gap))
        draw.text((left, side + gap + 4), image.name, fill="black", font=font)
        if image.name != TRUTH:
            text = f"PSNR {show(image.psnr, 'dB')}, identity {show(image.id_distance)}"
            draw.text((left, side + gap + 24), text, fill="dimgray", font=font)
    sheet.save(report.side_by_side)


def show(value: float | None, unit: str = "") -> str:
    """Return a measurement as text; a dash stands for a missing one."""
    return "-" if value is None else f"{value:g} {unit}".strip()
