"""`pfstorer-rt evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pfstorer_rt.cli.options import SEED, flag
from pfstorer_rt.console import echo, note
from pfstorer_rt.files import real_path

if TYPE_CHECKING:
    from pfstorer_rt.evaluation.report import Report

PATH = click.Path(path_type=Path)


@click.command()
@click.option(
    "--refs", required=True, type=PATH, help="Folder of reference photographs, or of one sub-folder per person."
)
@click.option("--hq", required=True, type=PATH, help="Folder of original images.")
@click.option(
    "--outputs",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Folder of restored images; repeat the option for several methods.",
)
@click.option("--inputs", type=PATH, help="Folder of the degraded images; adds `input` to the report.")
@click.option(
    "--level",
    type=click.Choice(["light", "heavy"]),
    help="Make the degraded images from the originals, with this strength.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Random seed of --level for the first image; the next image uses seed + 1.",
)
@click.option("--save-inputs", type=PATH, metavar="DIR", help="Save the degraded images of --level in this folder.")
@click.option(
    "--seconds",
    multiple=True,
    metavar="NAME=FILE|S",
    help="Time per image of a method: a file with the output of `restore --json`, or seconds.",
)
@click.option("--metrics", "keys", help="Metrics to measure, separated by commas. [default: all]")
@click.option("--arcface", type=PATH, help="ONNX file of a face recognizer of the ArcFace family.")
@click.option(
    "--arcface-range",
    type=click.Choice(["-1..1", "0..1", "0..255"]),
    default="-1..1",
    show_default=True,
    help="Range of the values that this recognizer takes.",
)
@click.option("--lpips", type=PATH, help="ONNX file of LPIPS: two images in, a distance out.")
@click.option("--alexnet", type=PATH, help="File of torchvision's AlexNet weights, for LPIPS without --lpips.")
@click.option("--landmarks", type=PATH, help="ONNX file of a network of 98 facial landmarks.")
@click.option("--niqe", type=PATH, help="File of NIQE's parameters: modelparameters.mat or niqe_pris_params.npz.")
@click.option("--musiq", type=PATH, help="File of pyiqa's MUSIQ weights.")
@click.option("-o", "--output", type=PATH, help="Folder for results.csv, summary.json, results.md, index.html.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row, then the means.")
def command(
    refs: Path,
    hq: Path,
    outputs: tuple[str, ...],
    inputs: Path | None,
    level: Literal["light", "heavy"] | None,
    seed: int,
    save_inputs: Path | None,
    seconds: tuple[str, ...],
    keys: str | None,
    arcface: Path | None,
    arcface_range: Literal["-1..1", "0..1", "0..255"],
    lpips: Path | None,
    alexnet: Path | None,
    landmarks: Path | None,
    niqe: Path | None,
    musiq: Path | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure restored images of any method against the originals and the photographs of the person.

    \b
    Examples:
      pfstorer-rt evaluate --refs photos/alice --hq clean/ --outputs restored/
      pfstorer-rt evaluate --refs photos/alice --hq clean/ --level heavy --save-inputs bad/
      pfstorer-rt evaluate --refs photos/alice --hq clean/ --inputs bad/ \\
          --outputs ours=restored/ --outputs theirs=other/ -o report/
    """
    from pfstorer_rt.cli.progress import count_bar
    from pfstorer_rt.evaluation.registry import MetricFiles
    from pfstorer_rt.evaluation.run import EvaluateConfig, run_evaluation

    config = EvaluateConfig(
        refs,
        hq,
        name_folders(outputs),
        inputs,
        level,
        seed,
        save_inputs,
        dict(split_seconds(text) for text in seconds),
        tuple(key.strip() for key in keys.split(",")) if keys else None,
        MetricFiles(arcface, arcface_range, alexnet, musiq, lpips, landmarks, niqe),
        output,
        overwrite,
    )
    with count_bar("evaluate") as progress:
        report = run_evaluation(config, progress)
    show(report, as_json)
    refused = keys is not None and report.metrics.refused  # without --metrics, metrics without their files are left out
    sys.exit(1 if refused or any(row.failed for row in report.rows) else 0)


def name_folders(outputs: Sequence[str]) -> dict[str, Path]:
    """Read `[NAME=]DIR` arguments; raises `click.UsageError` for a name given twice or kept for a reference row."""
    folders: dict[str, Path] = {}
    for text in outputs:
        name, found, folder = text.partition("=")
        path = Path(folder if found and not Path(text).is_dir() else text)
        name = name if found and not Path(text).is_dir() else real_path(path).name
        if not name or name in folders or name in ("input", "original"):
            raise click.UsageError(f"--outputs {text}: the name {name!r} is taken or empty; give NAME=DIR")
        folders[name] = path
    return folders


def split_seconds(text: str) -> tuple[str, float | Path]:
    """Read `NAME=SECONDS` or `NAME=FILE`; raises `click.UsageError` for any other text."""
    name, _, source = text.partition("=")
    if not name or not source:
        raise click.UsageError(f"--seconds {text}: expected NAME=FILE or NAME=NUMBER")
    try:
        return name, float(source)
    except ValueError:
        return name, Path(source)


def show(report: Report, as_json: bool) -> None:
    """Print rows and means as JSON, or a table of the means; notes go to stderr."""
    for text in report.notes:
        note(text)
    if as_json:
        for row in report.rows:
            figures = {k: ("inf" if v == float("inf") else v) for k, v in row.figures.items()}
            about = {"method": row.method, "image": row.image, "seconds": row.seconds, "note": row.note}
            echo(json.dumps({**about, **figures}, allow_nan=False))
        echo(json.dumps({"summary": json.loads(report.json())}))
        return
    print_table(report)
    for metric in report.metrics.columns:
        if metric.key in report.metrics.refused:
            hint = f" ({' or '.join(f'{flag(name)} FILE' for name in metric.files)})" if metric.files else ""
            echo(f"{metric.title}: {report.metrics.refused[metric.key]}{hint}")


def print_table(report: Report) -> None:
    """A line for each metric and a column for each method, which fits a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", *(f"{name}" for name in report.methods))
    lines = zip(*report.cells(), strict=True)
    next(lines)  # the names of the methods
    for heading, cells in zip(report.headings()[1:], lines, strict=True):
        if not any(cells):
            continue  # no method has times
        table.add_row(heading, *("-" if cell == "not measured" else cell for cell in cells))
    console = Console(markup=False)
    needed = console.measure(table).maximum
    width = console.width if console.is_terminal else max(console.width, needed)
    Console(width=width, markup=False).print(table)
