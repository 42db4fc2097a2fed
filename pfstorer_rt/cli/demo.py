"""`pfstorer-rt demo`: every step on images of a person who does not exist."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Literal

import click

from pfstorer_rt.cli.imports import fast_imports
from pfstorer_rt.cli.options import SEED
from pfstorer_rt.cli.threads import free_cores_only
from pfstorer_rt.console import echo

WORDS = (
    "identity distance: distance of dlib's embeddings to the original; below 0.6 counts as the same person; a dash: no",
    "face was found. It was a loss of the training, so it is optimistic.",
    "The person does not exist: a network generated the original and the five references.",
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
@click.option("--base", default="portrait", show_default=True, help="Base: portrait, or a base directory.")
@click.option(
    "--iterations",
    type=click.IntRange(1),
    help="Iterations of the personalization. [default: the base's]",
)
@click.option(
    "--level",
    type=click.Choice(["light", "heavy"]),
    default="heavy",
    show_default=True,
    help="Strength of the degradation.",
)
@click.option("--seed", type=SEED, default=4, show_default=True, help="Random seed of the degradation.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as one JSON object.")
def command(
    output: Path, base: str, iterations: int | None, level: Literal["light", "heavy"], seed: int, as_json: bool
) -> None:
    """Learn a person from five images, export, restore a degraded sixth image, and show all side by side.

    \b
    Example:
      pfstorer-rt demo -o demo
    """
    from pfstorer_rt.console import stage_bars

    with free_cores_only(), fast_imports():
        from pfstorer_rt.demo import DemoConfig, run_demo, show

    config = DemoConfig(base, iterations, level, seed)
    with stage_bars() as on_progress:
        report = run_demo(output, config, partial(echo, err=as_json), on_progress)
    if as_json:
        echo(json.dumps({"figures": report.figures, "seconds": round(report.seconds, 1)}))
        return
    echo(f"{'':<14}{'PSNR':>8}{'identity distance':>20}")
    for image in report.images:
        echo(f"{image.name:<14}{show(image.psnr, 'dB'):>8}{show(image.id_distance):>20}")
    for line in WORDS:
        echo(line)
    echo(f"{report.side_by_side}: all images side by side, after {report.seconds:.0f} s")
