"""Measure memory and time of importing a checkpoint of StableSR's full size.

    python benchmarks/import_base.py -o benchmarks/results/import_base.json

Writes checkpoints with random weights, with the names and shapes of the published files (6.5 GB with optimizer state,
and 0.5 GB), imports them with the command line, and samples the memory of that process. Anonymous memory is what the
process allocates; file memory is the pages of the mapped checkpoint, which the system can reclaim at any time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click
import torch

from pfstorer_rt.runtime.bench import machine

MANIFESTS = Path(__file__).parent.parent / "tests" / "models" / "manifests"
TRAINED = 105_514_240
"""Number of values of SPADEs and structure encoder; the published file also has AdamW's two moments for them."""


def shapes(*names: str) -> dict[str, list[int]]:
    return {k: v for name in names for k, v in json.loads((MANIFESTS / f"{name}.json").read_text()).items()}


def write_checkpoint(path: Path, sizes: dict[str, list[int]], moments: int) -> None:
    pool = torch.randn(2**22) * 0.02
    state = {
        k: pool.repeat(-(-torch.Size(s).numel() // len(pool)))[: torch.Size(s).numel()].reshape(s).clone()
        for k, s in sizes.items()
    }
    optimizer = {"state": {0: {"exp_avg": torch.zeros(moments), "exp_avg_sq": torch.zeros(moments)}}}
    torch.save({"state_dict": state, "optimizer_states": [optimizer], "epoch": 117}, path)


def watch(command: list[str]) -> dict[str, float]:
    """Run a command; returns its time in seconds and its peak anonymous and file-backed memory in GB."""
    started, peaks = time.perf_counter(), {"RssAnon": 0, "RssFile": 0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, rest = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(rest.split()[0]))
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{command} failed")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "allocated_gb": peaks["RssAnon"] / 1e6, "mapped_gb": peaks["RssFile"] / 1e6}


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--keep", type=click.Path(path_type=Path), help="Folder where the imported base is kept.")
def main(output: Path, keep: Path | None) -> None:
    parts = [f"stablesr_{p}" for p in ("unet", "structcond", "first_stage", "text_encoder", "schedule_buffers")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_checkpoint(folder / "stablesr_000117.ckpt", shapes(*parts), TRAINED)
        write_checkpoint(folder / "vqgan_cfw_00011.ckpt", shapes("cfw_vqgan"), 0)
        runs = {}
        for dtype in ("fp16", "fp32"):
            base = keep / dtype if keep else folder / dtype
            command = [
                sys.executable,
                "-m",
                "pfstorer_rt",
                "import-base",
                str(folder / "stablesr_000117.ckpt"),
                "--prediction-type",
                "epsilon",
                "--cfw",
                str(folder / "vqgan_cfw_00011.ckpt"),
                "--dtype",
                dtype,
                "-o",
                str(base),
            ]
            runs[dtype] = watch(command)
            runs[dtype]["base_gb"] = sum(f.stat().st_size for f in base.rglob("*.safetensors")) / 1e9
        sizes = {file.name: file.stat().st_size / 1e9 for file in folder.glob("*.ckpt")}
    facts = {"checkpoints_gb": sizes, "runs": runs, "machine": machine() | {"safetensors": version("safetensors")}}
    output.write_text(json.dumps(facts, indent=2) + "\n")
    click.echo(json.dumps(runs, indent=2))


if __name__ == "__main__":
    main()
