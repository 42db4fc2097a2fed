"""`pfstorer-rt evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pfstorer_rt.cli.options import SEED
from pfstorer_rt.console import note, say

if TYPE_CHECKING:
    from pfstorer_rt.evaluation.report import Report

PATH = click.Path(path_type=Path)
FILES = {"id_arcface": "--arcface", "lpips": "--alexnet", "musiq": "--musiq"}
"""Metric -> option with the file that it needs."""


@click.command()
@click.option(
    "--refs", required=True, type=PATH, help="Folder of reference photographs, or with a sub-folder per person."
)
@click.option("--hq", required=True, type=PATH, help="Folder of original images.")
@click.option(
    "--outputs",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Folder of restored images; repeat the option for several methods.",
)
@click.option("--inputs", type=PATH, help="Folder of the degraded images; adds a row for them.")
@click.option("--level", type=click.Choice(["light", "heavy"]), help="Degrade the originals, instead of --inputs.")
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
@click.option("--alexnet", type=PATH, help="File of torchvision's AlexNet weights, for LPIPS.")
@click.option("--musiq", type=PATH, help="File of pyiqa's MUSIQ weights.")
@click.option("-o", "--output", type=PATH, help="Folder for results.csv, summary.json, results.md, index.html.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row, then the means.")
def command(
    refs: Path,
    hq: Path,
    outputs: tuple[str, ...],
    inputs: Path | None,
    level: str | None,
    seed: int,
    save_inputs: Path | None,
    seconds: tuple[str, ...],
    keys: str | None,
    arcface: Path | None,
    alexnet: Path | None,
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
    if inputs and level:
        raise click.UsageError("give --inputs or --level, not both")
    if not (outputs or inputs or level):
        raise click.UsageError("nothing to measure; give --outputs DIR, --inputs DIR or --level")
    if save_inputs and not level:
        raise click.UsageError("--save-inputs needs --level")
    if output and (output / "results.csv").exists() and not overwrite:
        raise click.UsageError(f"{output}: contains a report already; choose another folder or pass --overwrite")
    folders = name_folders(outputs)
    times = dict(read_seconds(text, [*folders, "input"]) for text in seconds)
    from pfstorer_rt.evaluation.folders import evaluate
    from pfstorer_rt.evaluation.registry import MetricFiles, load_metrics

    metrics = load_metrics(keys.split(",") if keys else None, MetricFiles(arcface, alexnet, musiq))
    with ExitStack() as stack:
        if level:
            from pfstorer_rt.degradation.folder import degrade_folder
            from pfstorer_rt.files import work_folder

            inputs = save_inputs or stack.enter_context(work_folder())
            degrade_folder(hq, inputs, level, seed, overwrite)
        from pfstorer_rt.cli.progress import count_bar

        with count_bar("evaluate") as progress:
            report = evaluate(refs, hq, folders, inputs, seconds=times, metrics=metrics, progress=progress)
    if level:
        report.settings.update({"folder of input": str(save_inputs or "not kept"), "level": level, "seed": seed})
    if output:
        report.write(output)
    show(report, as_json)
    sys.exit(1 if any(row.failed for row in report.rows) else 0)


def name_folders(outputs: Sequence[str]) -> dict[str, Path]:
    """Read `[NAME=]DIR` arguments; raises `click.UsageError` for a name given twice or kept for a reference row."""
    folders: dict[str, Path] = {}
    for text in outputs:
        name, found, folder = text.partition("=")
        path = Path(folder if found and not Path(text).is_dir() else text)
        name = name if found and not Path(text).is_dir() else path.resolve().name
        if not name or name in folders or name in ("input", "original"):
            raise click.UsageError(f"--outputs {text}: the name {name!r} is taken or empty; give NAME=DIR")
        folders[name] = path
    return folders


def read_seconds(text: str, methods: Sequence[str]) -> tuple[str, float | dict[str, float]]:
    """Read `NAME=SECONDS`, or `NAME=FILE` of JSON lines as `restore --json` prints them."""
    name, _, source = text.partition("=")
    if name not in methods or not source:
        raise click.UsageError(f"--seconds {text}: expected NAME=FILE or NAME=NUMBER with NAME of {', '.join(methods)}")
    try:
        seconds = float(source)
    except ValueError:
        pass
    else:
        if not 0 <= seconds < float("inf"):
            raise click.UsageError(f"--seconds {text}: expected a number of seconds, 0 or more")
        return name, seconds
    try:
        lines = [json.loads(line) for line in Path(source).read_text().splitlines() if line.strip()]
        known = {Path(line["input"]).with_suffix("").as_posix(): line["seconds"] for line in lines if "seconds" in line}
        return name, {path: float(second) for path, second in known.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.UsageError(
            f"--seconds {text}: no number and no file of JSON lines as `restore --json` prints them ({error})"
        ) from error


def show(report: Report, as_json: bool) -> None:
    """Print rows and means as JSON, or a table of the means; notes go to stderr."""
    for text in report.notes:
        note(text)
    if as_json:
        for row in report.rows:
            figures = {k: ("inf" if v == float("inf") else v) for k, v in row.figures.items()}
            about = {"method": row.method, "picture": row.picture, "seconds": row.seconds, "note": row.note}
            say(json.dumps({**about, **figures}, allow_nan=False))
        say(json.dumps({"summary": json.loads(report.json())}))
        return
    print_table(report)
    for metric in report.metrics.columns:
        if metric.key in report.metrics.refused:
            hint = f" ({FILES[metric.key]} FILE)" if metric.key in FILES else ""
            say(f"{metric.title}: {report.metrics.refused[metric.key]}{hint}")


def print_table(report: Report) -> None:
    """A line for each metric and a column for each method, which fits a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", *(f"{name}" for name in report.methods))
    lines = zip(*report.cells(), strict=True)
    next(lines)  # the names of the methods
    for heading, cells in zip(report.headings()[1:], lines, strict=True):
        table.add_row(heading, *("-" if cell == "not measured" else cell for cell in cells))
    console = Console(markup=False)
    needed = console.measure(table).maximum
    width = console.width if console.is_terminal else max(console.width, needed)
    Console(width=width, markup=False).print(table)
