"""Measure memory and time of exporting a full-size base, and restore one tile with its plan.

    python benchmarks/export_sd21.py -o benchmarks/results/export_sd21.json --scratch DIR

Makes an SD 2.1 base and an identity with random weights (fp16 on disk), exports them to ONNX plans with the command
line, and restores one 512-pixel tile in two steps with ONNX Runtime. Every command runs in its own process; its memory
is the peak resident size (`ru_maxrss`), which includes pages of mapped files. DIR needs 20 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
from common import machine
from PIL import Image
from skimage import data

from pfstorer_rt.plan import Plan

PREPARE = """
import sys
from pathlib import Path
import torch
from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.models.base import build_base
from pfstorer_rt.training.data import read_photo
from pfstorer_rt.training.losses import PersonalizationObjective
from pfstorer_rt.training.personalize import make_identity

folder, photo = Path(sys.argv[1]), Path(sys.argv[2])
base, config = build_base("sd21"), PersonalizeConfig()
base.save(folder / "sd21", torch.float16)
objective = PersonalizationObjective(base, config)
with torch.no_grad():
    for block in objective.blocks:
        block.gamma.copy_(0.1 * torch.randn(block.gamma.shape))
make_identity("sd21", objective, base, config, [photo], [read_photo(photo)]).save(folder / "sd21.safetensors")
"""


def watch(*command: str | Path) -> dict[str, float]:
    """Run a command; returns its time in seconds and its peak memory in GB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    seconds, busy, peak = time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return {"seconds": round(seconds, 1), "processor_seconds": round(busy, 1), "peak_gb": round(peak / 1e9, 2)}


def size(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 1e9, 3)


def measure(folder: Path, precision: str, keep: bool) -> dict[str, object]:
    """Export with a precision and restore a tile with the plan."""
    plan, restored, cli = folder / f"{precision}.plan", folder / "restored.png", ("-m", "pfstorer_rt")
    named = ("--identity", folder / "sd21.safetensors", "--base", folder / "sd21")
    export = watch(*cli, "export", *named, "--precision", precision, "--overwrite", "-o", plan)
    use = ("--engine", plan, "--backend", "onnxruntime", "--steps", "2", "--overwrite", "-o", restored)
    restore = watch(*cli, "restore", folder / "tile.png", *use)
    payloads = Plan.open(plan).manifest.payloads
    row = {
        "export": export,
        "restore": restore,
        "plan_gb": size(plan),
        "beside": [payload.weights for payload in payloads.values() if payload.weights],
        "precision": {name: payload.precision for name, payload in payloads.items()},
        "parity": {name: payload.parity["relative"] for name, payload in payloads.items()},
        "restored": {"size": Image.open(restored).size, "deviation": float(np.asarray(Image.open(restored)).std())},
    }
    if not keep:
        plan.unlink()
    return row


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option(
    "--scratch", required=True, type=click.Path(path_type=Path), help="Folder of the base; reused if present."
)
@click.option("--precision", "precisions", multiple=True, default=("fp16", "fp32"))
@click.option("--keep", is_flag=True, help="Keep the plans in DIR.")
def main(output: Path, scratch: Path, precisions: tuple[str, ...], keep: bool) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data.astronaut()).save(scratch / "tile.png")
    if not (scratch / "sd21.safetensors").is_file():
        watch("-c", PREPARE, scratch, scratch / "tile.png")
    sizes = {"base_gb": size(scratch / "sd21"), "identity_gb": size(scratch / "sd21.safetensors")}
    runs = {}
    for precision in precisions:
        runs[precision] = measure(scratch, precision, keep)
        facts = {**sizes, "runs": runs, "machine": machine()}
        output.write_text(json.dumps(facts, indent=2) + "\n")
    click.echo(json.dumps(runs, indent=2))


if __name__ == "__main__":
    main()
