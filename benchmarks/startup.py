"""Measure the start of the command `restore`: seconds to the first result, processor time and peak memory.

    python benchmarks/startup.py -o benchmarks/results/startup.csv --engine alice.plan [--python OTHER/bin/python]

One row per backend: medians of new processes that restore one image of the plan's tile size, after a first one that
fills the cache of compiled networks. `import_s` is the time to import `pfstorer_rt.runtime.restorer`, without the start
of Python. `cpu_s` is processor time, which depends less on other processes. `restore_s` is one more restoration in a
running process. --python measures another installation, such as an earlier version; --name is its name in the table.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from common import machine, read, write
from PIL import Image

from pfstorer_rt.plan import Plan

IMPORT = "import time; t = time.perf_counter(); import pfstorer_rt.runtime.restorer; print(time.perf_counter() - t)"
WARM = """
import sys, time, numpy as np
from pfstorer_rt.runtime.restorer import Restorer
with Restorer.from_plan(sys.argv[1], sys.argv[2]) as restorer:
    image, times = np.random.default_rng(0).random((restorer.manifest.tile,) * 2 + (3,), np.float32), []
    for _ in range(6):
        started = time.perf_counter()
        restorer.restore(image)
        times.append(time.perf_counter() - started)
print(sorted(times[1:])[2])
"""


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--engine", required=True, type=click.Path(exists=True, path_type=Path), help="An ONNX plan.")
@click.option("--backend", "backends", multiple=True, default=("onnxruntime", "openvino"), show_default=True)
@click.option("--python", default=sys.executable, help="Python of the measured installation.")
@click.option("--name", default="this version", show_default=True)
@click.option("--runs", default=5, show_default=True)
def main(output: Path, engine: Path, backends: tuple[str, ...], python: str, name: str, runs: int) -> None:
    manifest = Plan.open(engine).manifest
    rows = read(output)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "old.png"
        noise = np.random.default_rng(0).integers(0, 256, (manifest.tile, manifest.tile, 3), np.uint8)
        Image.fromarray(noise).save(image)
        for backend in backends:
            plan = str(engine.resolve())
            call = [python, "-m", "pfstorer_rt", "restore", "--engine", plan, "--backend", backend]
            call += [str(image), "-o", f"{folder}/new.png", "--overwrite"]
            measured = [start(call, folder) for _ in range(runs + 1)][1:]  # the first run fills the caches
            found = {key: round(statistics.median(one[key] for one in measured), 2) for key in measured[0]}
            found["import_s"] = round(statistics.median(number(folder, python, "-c", IMPORT) for _ in range(runs)), 3)
            found["restore_s"] = round(number(folder, python, "-c", WARM, plan, backend), 3)
            about = {"version": name, "backend": backend, "precision": manifest.precision, "base": manifest.base_name}
            rows.append({**about, **found, **machine()})
            click.echo(f"{name} {backend} {manifest.precision}: {found}")
    write(output, rows)


def start(call: list[str], folder: str) -> dict[str, float]:
    """Run a command in a folder without a copy of the package.

    Returns seconds, processor time in seconds, and the largest resident size in MB.
    """
    started = time.perf_counter()
    process = subprocess.Popen(call, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(call)} failed with status {process.returncode}")
    return {"wall_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def number(folder: str, *command: str) -> float:
    """Return the number that a command prints, run in a folder."""
    return float(subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
