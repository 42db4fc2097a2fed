"""The demo: learn a person who does not exist from five images, restore a degraded sixth image, and measure it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pfstorer_rt.config import PersonalizeConfig, RestoreConfig
from pfstorer_rt.extras import needed_by
from pfstorer_rt.files import make_folder
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.plan import DEFAULT_BASE
from pfstorer_rt.progress import OnProgress, ignore_progress

IMAGES = Path(__file__).parent / "demo_images"
"""The generated images of the person; the folder's README.md states their source and licence."""
NAME = "nobody"
TRUTH = "ground truth"
FILES = {"input": "input.png", "base": "base.png", "personalized": "restored.png", TRUTH: "truth.png"}
"""Name of an image -> its file."""


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo."""

    base: str | Path = DEFAULT_BASE
    """Name of a shipped base, or a base directory."""
    iterations: int | None = None
    """Iterations of the personalization; None selects the base's."""
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
    """Run every step on generated images of one person, and write all files to the folder `output`; it replaces files.

    note: called with a line after each part. Raises `MissingBackendError` when a package of the extra `all` is missing,
    before anything is written.
    """
    config, started = config or DemoConfig(), time.perf_counter()
    check_installed()
    truth, lq = degraded_image(config)
    make_folder(output)
    references = reference_files()
    note(f"{output}: {len(references)} references, and the input image with {config.level} degradation")
    plan = learn_and_export(references, output, config, on_progress)
    note(f"{plan}: learned and exported after {time.perf_counter() - started:.0f} s")
    results = {"input": lq, **restore_both(lq, plan), TRUTH: truth}
    images = write_images(output, results)
    report = DemoReport(images, output / "side_by_side.png", plan, time.perf_counter() - started)
    draw_sheet(report, results)
    (output / "results.json").write_text(json.dumps(report.figures, indent=2) + "\n")
    return report


def check_installed() -> None:
    """Raise `MissingBackendError` unless every step of the demo is installed."""
    with needed_by("demo", "all"):
        import pfstorer_rt.export
        import pfstorer_rt.faces.dlib
        import pfstorer_rt.training.personalize  # noqa: F401


def reference_files() -> list[Path]:
    """Return the files of the five references."""
    return sorted(IMAGES.glob("reference_*.jpg"))


def degraded_image(config: DemoConfig) -> tuple[Pixels, Pixels]:
    """Return the original and its degraded image, both (512, 512, 3) in [0, 1]."""
    from pfstorer_rt.degradation.degrade import degrade
    from pfstorer_rt.imaging.files import load_image

    truth = load_image(IMAGES / "original.jpg").pixels
    image = torch.from_numpy(truth).permute(2, 0, 1).contiguous()
    return truth, degrade(image, config.level, config.seed).permute(1, 2, 0).numpy()


def learn_and_export(references: list[Path], output: Path, config: DemoConfig, on_progress: OnProgress) -> Path:
    """Learn an identity from the references, export it, and return the file of the plan."""
    from pfstorer_rt.export import export_plan
    from pfstorer_rt.models.base import load_base
    from pfstorer_rt.training.personalize import personalize

    base = load_base(config.base)
    train = {"iterations": config.iterations} if config.iterations else {}
    settings = PersonalizeConfig.for_base(base.config, train)
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
            text = f"PSNR {show(image.psnr, 'dB')}, identity distance {show(image.id_distance)}"
            draw.text((left, side + gap + 24), text, fill="dimgray", font=font)
    sheet.save(report.side_by_side)


def show(value: float | None, unit: str = "") -> str:
    """Return a measurement as text; a dash stands for a missing one."""
    return "-" if value is None else f"{value:g} {unit}".strip()
