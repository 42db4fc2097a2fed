"""`pfstorer-rt bench`."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import click

from pfstorer_rt.cli.options import NewFile, Number, check_output, check_plan
from pfstorer_rt.console import echo
from pfstorer_rt.runtime.bench import SIZES, BenchConfig, BenchReport, measure_plan


@click.command()
@click.option("--engine", required=True, type=click.Path(), help="Plan file.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt", "torch"]),
    default="auto",
    show_default=True,
    help="Library that runs the plan; auto takes the fastest that is installed.",
)
@click.option("--provider", help="Device of the backend: cpu, cuda; for openvino CPU, CPU:f32, CPU:bf16, GPU.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Number of diffusion steps. [default: the plan's]")
@click.option(
    "--runs", type=click.IntRange(2), default=20, show_default=True, help="Largest number of runs of each measurement."
)
@click.option("--seconds", type=Number(0), default=30.0, show_default=True, help="Time limit of each measurement.")
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(1, 16_384),
    multiple=True,
    default=SIZES,
    show_default=True,
    help="Side of a square image in pixels; repeat the option for several.",
)
@click.option("--csv", "table", type=NewFile(), help="Also write the table to this CSV file.")
@click.option("--plot", type=NewFile(), help="Also draw the table as a PNG.")
@click.option("--overwrite", is_flag=True, help="Replace the files of --csv and --plot.")
@click.option("--trust-plan", is_flag=True, help="Run a TensorRT plan (executable code) that was built elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    engine: str,
    backend: str,
    provider: str | None,
    steps: int | None,
    runs: int,
    seconds: float,
    sizes: tuple[int, ...],
    table: Path | None,
    plot: Path | None,
    overwrite: bool,
    trust_plan: bool,
    as_json: bool,
) -> None:
    """Time a plan on this machine: its cold start, each component, and whole images.

    \b
    Examples:
      pfstorer-rt bench --engine alice.plan --json
      pfstorer-rt bench --engine alice.plan --size 512 --csv bench.csv --plot bench.png
    """
    from pfstorer_rt.files import make_folder

    check_plan(engine)
    files = [path for path in (table, plot) if path]
    for path in files:
        check_output(path, overwrite)
    if plot and plot.suffix.lower() != ".png":
        raise click.UsageError(f"--plot {plot}: expected a name that ends with .png")
    report = measure_plan(engine, BenchConfig(backend, provider, steps, runs, seconds, sizes, trust_plan))
    for path in files:
        make_folder(path.parent)
    if table:
        write_table(table, report)
    if plot:
        from pfstorer_rt.runtime.benchplot import draw

        draw(plot, report)
    for line in [json.dumps(asdict(report))] if as_json else lines(report):
        echo(line)


def lines(report: BenchReport) -> list[str]:
    """Return the table as text."""
    rows = [
        f"engine: {report.backend} ({report.provider}); sampler {report.sampler}, steps: {report.steps}",
        f"cold start {report.cold_start_s:.2f} s, peak memory {report.peak_memory_mb:.0f} MB",
    ]
    for name, figures in {**report.components_ms, **report.images_ms}.items():
        rates = "".join(f"  {figures[key]:.3f} {unit}" for key, unit in RATES.items() if key in figures)
        percentiles = "  ".join(f"{key} {value:9.1f}" for key, value in figures.items() if key in PERCENTILES)
        rows.append(f"{name:<18} {percentiles} ms  {figures['runs']} runs{rates}")
    facts = ", ".join(f"{k} {v}" for k, v in {**report.machine, **report.clock}.items())
    return [*rows, facts, f"method: {report.method}"]


PERCENTILES = ("p50", "p90", "p99")
RATES = {"megapixels_per_s": "MP/s", "tiles_per_s": "tiles/s"}


def write_table(path: Path, report: BenchReport) -> None:
    """Write a row for each component and size, with the machine that they were measured on."""
    from pfstorer_rt.files import atomic_write

    names = ("engine", "backend", "provider", "steps", "sampler", "cold_start_s", "peak_memory_mb")
    fixed = {**{name: getattr(report, name) for name in names}, **report.machine, **report.clock}
    parts = {**report.components_ms, **report.images_ms}
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, newline="", write_through=True)
        writer = csv.DictWriter(text, ["measured", *PERCENTILES, "runs", *RATES, *fixed], restval="")
        writer.writeheader()
        writer.writerows({"measured": name, **figures, **fixed} for name, figures in parts.items())
        text.detach()
