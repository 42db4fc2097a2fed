"""Functions that the benchmarks share: description of the machine, images as arrays, CSV files."""

from __future__ import annotations

import csv
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
import torch

from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.runtime.bench import processor

Command = Callable[..., Any]
LARGEST_PSNR = 99.0
"""Value of `tables.py` for equal images, in dB."""
NETWORKS = ("lpips", "recognizer", "landmarks")


def measuring(side: int) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options of a measurement on people; side: default of `--side`."""
    file = click.Path(exists=True, path_type=Path)
    options = [
        click.option("-o", "--output", required=True, type=click.Path(path_type=Path)),
        click.option("--base", default="portrait", show_default=True),
        click.option("--tests", default=6, show_default=True, help="Number of images of each person."),
        click.option("--side", default=side, show_default=True),
        *(click.option(f"--{name}", required=True, type=file) for name in NETWORKS),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def hwc(image: torch.Tensor) -> Pixels:
    """Return (3, H, W) as (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def machine() -> dict[str, Any]:
    """Return hardware, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "commit": commit.strip(),
    }


def rounded(value: float | None) -> float | str:
    """Return a value for the CSV file, empty if it is unknown or infinite."""
    return "" if value is None or not math.isfinite(value) else round(value, 4)


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier run."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_table(text: str, script: str, table: str) -> str:
    """Replace the table of a page between the comments `<!-- table: ... SCRIPT ... -->` and `<!-- end of table -->`.

    Raises `ClickException` without these comments.
    """
    place = re.compile(rf"(<!-- table: [^\n]*{re.escape(script)}[^\n]*-->\n).*?(<!-- end of table -->)", re.DOTALL)
    if not place.search(text):
        raise click.ClickException(f"no '<!-- table: {script} -->' and '<!-- end of table -->' in the page; add them")
    return place.sub(lambda found: found[1] + table + found[2], text)


def replace_table(page: Path, script: str, table: str) -> None:
    """Replace the table of a script in a page; raises as `with_table`."""
    page.write_text(with_table(page.read_text(), script, table))


def write_report(report: dict[str, Any], output: Path | None) -> None:
    """Print a report as JSON, and write it to a file if one is given."""
    text = json.dumps(report, indent=2) + "\n"
    sys.stdout.write(text)
    if output:
        output.write_text(text)


def line(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def by(rows: Sequence[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Group rows by a column, in order of appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def values(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Return the values of a column, without empty cells."""
    return [float(row[key]) for row in rows if row[key] != ""]


def number(found: Sequence[float], digits: int) -> str:
    """Return the mean as text."""
    return f"{fmean(found):.{digits}f}".replace("inf", "∞") if found else "-"
