"""Measure the peak memory of restoring a very large image in a new process.

    python benchmarks/memory.py -o benchmarks/results/memory.csv --megapixels 100 [--engine nano.plan] [--steps 1]

Without --engine, the script makes a plan of a `nano` base with random weights, so the result is the memory of the
runtime. The input is a smooth PNG; `predicted_mb` is the forecast of `--dry-run`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import psutil
from common import machine, write

from pfstorer_rt.imaging.files import save_image
from pfstorer_rt.imaging.rows import Band


class Waves:
    """A smooth image, computed by rows."""

    def __init__(self, side: int) -> None:
        self.height = self.width = side

    def read(self, start: int, stop: int) -> Band:
        """Return rows start..stop-1."""
        y, x, channel = np.arange(start, stop)[None, :, None], np.arange(self.width), np.arange(3)[:, None, None]
        return (0.5 * np.sin(x / 37 + channel) + 0.4 * np.cos(y / 53)).astype(np.float32)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--megapixels", multiple=True, type=float, default=(1, 25, 100), show_default=True)
@click.option("--engine")
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--steps", default=1, show_default=True)
def main(output: Path, megapixels: tuple[float, ...], engine: str | None, backend: str, steps: int) -> None:
    rows = []
    with TemporaryDirectory() as folder:
        plan = engine or make_plan(Path(folder))
        for size in megapixels:
            source = Path(folder) / "huge.png"
            side = round((size * 1e6) ** 0.5)
            save_image(source, Waves(side), overwrite=True)
            call = [sys.executable, "-m", "pfstorer_rt", "restore", "--engine", plan, "--backend", backend]
            call += ["--steps", str(steps), "--json", str(source), "-o", f"{folder}/out.png", "--overwrite"]
            said = json.loads(subprocess.run([*call, "--dry-run"], capture_output=True, check=True).stdout)
            started, peak = time.perf_counter(), 0
            process = psutil.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            while process.poll() is None:
                peak = max(peak, process.memory_info().rss if process.is_running() else 0)
                time.sleep(0.05)
            report = json.loads(process.stdout.read())
            if report["status"] != "done":
                raise click.ClickException(report["error"])
            rows.append(
                {
                    "megapixels": size,
                    "side": side,
                    "peak_mb": round(peak / 1e6),
                    "predicted_mb": said["predicted_peak_mb"],
                    "seconds": round(time.perf_counter() - started, 1),
                    "predicted_seconds": said["predicted_seconds"],
                    "tiles": report["tiles"],
                    "steps": steps,
                    "engine": Path(plan).name,
                    "backend": backend,
                    **machine(),
                }
            )
            click.echo("  ".join(f"{k} {v}" for k, v in list(rows[-1].items())[:8]))
    write(output, rows)


def make_plan(folder: Path) -> str:
    """Export a nano base."""
    from pfstorer_rt.export import export_plan

    from pfstorer_rt.models.base import build_base

    return str(export_plan(folder / "nano.plan", None, build_base("nano", seed=0)).path)


if __name__ == "__main__":
    main()
