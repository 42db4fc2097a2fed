"""`pfstorer-rt bench`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import click

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.runtime.bench import METHOD, SIZES, measure


@click.command()
@click.option("--engine", required=True, type=click.Path(), help="Plan file.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt", "torch"]),
    default="auto",
    show_default=True,
)
@click.option("--provider", help="Where the backend runs: cpu, cuda; with openvino CPU, CPU:f32, CPU:bf16, GPU.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Diffusion steps. [default: the engine's own]")
@click.option("--runs", type=click.IntRange(2), default=20, show_default=True, help="Of each measurement, at most.")
@click.option("--seconds", type=click.FloatRange(0), default=30.0, show_default=True, help="Of each, about.")
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(1),
    multiple=True,
    default=SIZES,
    show_default=True,
    help="Side of a square picture.",
)
@click.option("--csv", "table", type=click.Path(path_type=Path), help="Write the table to this file, too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it as a PNG.")
@click.option("--overwrite", is_flag=True, help="Replace the files of --csv and --plot.")
@click.option("--trust-plan", is_flag=True, help="Run a TensorRT plan (executable code) that others built.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(table: Path | None, plot: Path | None, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Time a plan on this machine: cold start, each component, whole pictures.

    \b
    Examples:
      pfstorer-rt bench --engine alice.plan --json
      pfstorer-rt bench --engine alice.plan --size 512 --csv bench.csv --plot bench.png
    """
    for path in (table, plot):
        if path and path.exists() and not overwrite:
            raise PFStorerError(f"{path}: exists already; choose another name or pass --overwrite")
    report = measure(**options)
    if table:
        write_table(table, report)
    if plot:
        from pfstorer_rt.cli.benchplot import draw

        draw(plot, report)
    click.echo(json.dumps(report) if as_json else "\n".join(lines(report)))


def lines(report: dict[str, Any]) -> list[str]:
    """Return the table as text."""
    cold, memory, clock = report["cold_start_s"], report["peak_memory_mb"], report["clock"]
    rows = [
        f"{report['backend']} on {report['provider']}, {report['steps']} steps of {report['sampler']}",
        f"cold start {cold:.2f} s, peak memory {memory:.0f} MB",
    ]
    for name, figures in {**report["components_ms"], **report["pictures_ms"]}.items():
        rates = "".join(f"  {figures[key]:.3f} {unit}" for key, unit in RATES.items() if key in figures)
        rows.append(
            f"{name:<18} p50 {figures['p50']:9.1f}  p90 {figures['p90']:9.1f}  p99 {figures['p99']:9.1f} ms  "
            f"{figures['runs']} runs{rates}"
        )
    return [*rows, ", ".join(f"{k} {v}" for k, v in {**report["machine"], **clock}.items()), f"method: {METHOD}"]


RATES = {"megapixels_per_s": "MP/s", "tiles_per_s": "tiles/s"}


def write_table(path: Path, report: dict[str, Any]) -> None:
    """Write a row for each component and size, with what they were measured on."""
    from pfstorer_rt.files import atomic_write

    fixed = {k: report[k] for k in ("engine", "backend", "provider", "steps", "sampler", "cold_start_s")}
    fixed |= {"peak_memory_mb": report["peak_memory_mb"], **report["machine"], **report["clock"]}
    parts = {**report["components_ms"], **report["pictures_ms"]}
    names = ["measured", "p50", "p90", "p99", "runs", *RATES, *fixed]
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, newline="", write_through=True)
        writer = csv.DictWriter(text, names, restval="")
        writer.writeheader()
        writer.writerows({"measured": name, **figures, **fixed} for name, figures in parts.items())
        text.detach()
