"""Compare the time of one tile of a full-size base with plain PyTorch.

    python benchmarks/sd21_tile.py --scratch DIR -o benchmarks/results/sd21_tile.csv

DIR is the folder of `benchmarks/export_sd21.py --precision fp16 --precision int8 --scratch DIR --keep`: an SD 2.1 base
and an identity with random weights, and their plans. One 512-pixel tile in two steps, with diffusers' modules in eager
PyTorch fp32 and bf16, and with the plans in ONNX Runtime and OpenVINO. They do not fit into a small machine's memory
together, so each runs in its own process, one after the other, for `--rounds` rounds. `warm_s` is the median over the
rounds of a process's second image. `ratio` is the median over the rounds of eager fp32's time divided by the method's
time in the same round. `cold_s` is the time from opening the engine to the first image (OpenVINO caches compiled
networks after the first round). `peak_gb` is the peak resident memory without mapped files, `resident_gb` with them.
`psnr_to_eager` compares the images with eager fp32's. `gflops` is the tile's arithmetic, counted by PyTorch, divided by
`warm_s`. The row `matmul bf16` has the rate of a product of two 4096x4096 matrices on the same processor, which limits
every engine that computes in bf16.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from common import machine, write

from pfstorer_rt.imaging.similarity import psnr

EAGER = "eager fp32"
PEERS = {
    EAGER: ("torch", None, "fp16"),
    "eager bf16": ("torch", "bf16", "fp16"),
    "onnxruntime": ("onnxruntime", None, "fp16"),
    "onnxruntime int8": ("onnxruntime", None, "int8"),
    "openvino f32": ("openvino", "CPU:f32", "fp16"),
    "openvino bf16": ("openvino", "CPU:bf16", "fp16"),
    "openvino int8": ("openvino", "CPU:f32", "int8"),
    "openvino int8 bf16": ("openvino", "CPU:bf16", "int8"),
}
"""Method -> backend, provider and plan."""

ONE = """
import json, sys, time
from contextlib import nullcontext
from pathlib import Path
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.imaging.files import load_image
from pfstorer_rt.runtime.restorer import Restorer

folder, backend, provider, plan, result = Path(sys.argv[1]), *sys.argv[2:6]
started, pixels = time.perf_counter(), load_image(folder / "tile.png").pixels
half = torch.autocast("cpu", torch.bfloat16) if provider == "bf16" else nullcontext()
if backend == "torch":
    opened = Restorer.from_base(folder / "sd21", folder / "sd21.safetensors", device="cpu")
else:
    opened = Restorer.from_plan(folder / f"{plan}.plan", backend, provider=provider or None)
times, flops = [started], 0
with opened as restorer, half:
    for _ in range(2):
        restored = restorer.restore(pixels, RestoreConfig(steps=2))
        times.append(time.perf_counter())
    if sys.argv[6:]:
        with FlopCounterMode(display=False) as counter:
            restorer.restore(pixels, RestoreConfig(steps=2))
        flops = counter.get_total_flops()
np.save(result, restored)
figures = {"warm_s": times[2] - times[1], "flops": flops}
print(json.dumps(figures | {"provider": restorer.provider, "cold_s": times[1] - started}))
"""


def run(scratch: Path, name: str, result: Path, count: bool) -> dict[str, Any]:
    """Restore the tile twice in a new process, and a third time where operations are counted."""
    backend, provider, plan = PEERS[name]
    given = [str(scratch), backend, provider or "", plan, str(result), *(["count"] if count else [])]
    own = resident = 0
    with psutil.Popen([sys.executable, "-c", ONE, *given], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with suppress(psutil.Error):  # the process may have ended
                memory = process.memory_info()
                own, resident = max(own, memory.rss - memory.shared), max(resident, memory.rss)
            time.sleep(0.05)
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{name} failed")
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    figures |= {"peak_gb": own / 1e9, "resident_gb": resident / 1e9}
    click.echo(f"{name}: {figures}", err=True)
    return figures


def matmul_gflops() -> float:
    """Return the rate of a large matrix product in bf16 in Gflop/s, the best of ten."""
    a, b, best = torch.randn(4096, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16(), float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 4096**3 / best / 1e9


@click.command()
@click.option("--scratch", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([n for n in PEERS if n != EAGER]),
    help="Methods to measure besides eager fp32.",
)
def main(scratch: Path, output: Path, rounds: int, only: tuple[str, ...]) -> None:
    names = [name for name in PEERS if not only or name in (EAGER, *only)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    load = os.getloadavg()[0]
    most = matmul_gflops()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{i}.npy" for i, name in enumerate(names)}
        for i in range(rounds):
            for name in names:
                found[name].append(run(scratch, name, files[name], count=name == EAGER and not i))
        images = {name: np.load(file) for name, file in files.items()}
    rows, flops = [], found[EAGER][0]["flops"]
    for name, runs in found.items():
        ratios = [a["warm_s"] / b["warm_s"] for a, b in zip(found[EAGER], runs, strict=True)]
        warm = statistics.median(r["warm_s"] for r in runs)
        rows.append(
            {
                "name": name,
                "provider": runs[0]["provider"],
                "size": 512,
                "steps": 2,
                "rounds": rounds,
                "warm_s": round(warm, 2),
                "ratio": round(statistics.median(ratios), 2),
                "gflops": round(flops / warm / 1e9),
                "cold_s": round(statistics.median(r["cold_s"] for r in runs), 1),
                "peak_gb": round(max(r["peak_gb"] for r in runs), 2),
                "resident_gb": round(max(r["resident_gb"] for r in runs), 2),
                "psnr_to_eager": round(min(99.0, psnr(images[name], images[EAGER])), 2),
                "load": round(load, 1),
                **machine(),
            }
        )
        click.echo("  ".join(f"{k} {v}" for k, v in list(rows[-1].items())[:11]))
    rows.append({"name": "matmul bf16", "gflops": round(most), **machine()})
    write(output, rows)


if __name__ == "__main__":
    main()
