"""Compare the restoration time of plans with plain PyTorch in one run.

    python benchmarks/peers.py --engine portrait.plan --int8 portrait8.plan -o benchmarks/results/peers.csv

PyTorch: diffusers' modules, eager in fp32 and bf16, and compiled with `torch.compile`. Plans: in ONNX Runtime, in
OpenVINO fp32 and bf16, and a plan exported with `--precision int8` in both. All restore the same tiles with the same
steps, sampler, noise and colour fix: one tile and an image of several tiles, from scikit-image's public-domain
astronaut, degraded with a fixed seed. The methods alternate in rounds, so that other load on the machine affects all of
them. `p50` is the median time in seconds; `ratio` is the median over the rounds of eager fp32's time divided by the
method's time in the same round. `psnr` compares the result with the original, `psnr_to_eager` with eager PyTorch's
result. `cold_s` and `cold_peak_mb` are time and peak resident memory of a new process, from its start to the restored
image on disk. `--page` writes the table of a CSV file to a page and measures nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import psutil
import torch
from common import by, line, machine, read, replace_table, write

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.imaging.files import save_image
from pfstorer_rt.imaging.rows import Pixels
from pfstorer_rt.imaging.similarity import psnr
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.training.device import has_native_bf16

OURS = {
    "onnxruntime": ("onnxruntime", None),
    "openvino f32": ("openvino", "CPU:f32"),
    "openvino bf16": ("openvino", "CPU:bf16"),
    "onnxruntime int8": ("onnxruntime", None),
    "openvino int8": ("openvino", None),
}
EAGER = "eager fp32"


@click.command()
@click.option("--engine")
@click.option("--int8", help="The same plan, exported with --precision int8.")
@click.option("--base", default="portrait", show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--size", "sizes", multiple=True, default=(512, 1280), show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("--steps", type=int)
@click.option("--without", multiple=True, help="Method to leave out, such as compile.")
@click.option("--page", type=click.Path(exists=True, path_type=Path), help="Page whose table to replace.")
def main(
    engine: str | None,
    int8: str | None,
    base: str,
    output: Path,
    sizes: tuple[int, ...],
    runs: int,
    steps: int | None,
    without: tuple[str, ...],
    page: Path | None,
) -> None:
    if page:
        replace_table(page, "peers.py", table(read(output)))
        return
    if not engine or not int8:
        raise click.UsageError("give --engine PLAN and --int8 PLAN")
    config, rows = RestoreConfig(steps=steps), []
    plans = {name: int8 if "int8" in name else engine for name in OURS}
    with ExitStack() as stack:
        calls = {n: c for n, c in competitors(plans, base, stack).items() if not any(w in n for w in without)}
        for size in sizes:
            rows += measure(calls, size, config, runs)
    for row in rows:
        row |= {**cold(row["name"], plans.get(row["name"]), base, row["size"]), **machine()}
        click.echo("  ".join(f"{k} {v}" for k, v in list(row.items())[:11]))
    write(output, rows)


def measure(
    calls: dict[str, Callable[[Pixels, RestoreConfig], Pixels]], size: int, config: RestoreConfig, runs: int
) -> list[dict[str, Any]]:
    """Restore an image with every method, alternating."""
    truth, lq = sample(size)
    results = {name: call(lq, config) for name, call in calls.items()}  # warm-up, compilation included
    times: dict[str, list[float]] = {name: [] for name in calls}
    load = os.getloadavg()[0]
    for _ in range(runs):
        for name, call in calls.items():
            started = time.perf_counter()
            call(lq, config)
            times[name].append(time.perf_counter() - started)
    rows = []
    for name, result in results.items():
        ratios = [a / b for a, b in zip(times[EAGER], times[name], strict=True)]
        rows.append(
            {
                "name": name,
                "size": size,
                "steps": config.steps or "own",
                "p50": round(float(np.median(times[name])), 4),
                "best": round(min(times[name]), 4),
                "ratio": round(float(np.median(ratios)), 2),
                "runs": runs,
                "psnr": round(psnr(result, truth), 3),
                "psnr_to_eager": round(min(99.0, psnr(result, results[EAGER])), 2),
                "load": round(load, 1),
            }
        )
    return rows


def sample(size: int) -> tuple[Pixels, Pixels]:
    """Return a portrait and its degraded version, (size, size, 3)."""
    from skimage.data import astronaut

    whole = torch.from_numpy(astronaut()[:, 20:492] / 255).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(whole, (size, size), mode="bicubic", antialias=True).clamp(0, 1)[0]
    bad = degrade(image.contiguous(), "light", 1)
    return tuple(np.ascontiguousarray(i.permute(1, 2, 0).numpy()) for i in (image, bad))  # type: ignore[return-value]


def competitors(
    plans: dict[str, str], base: str, stack: ExitStack
) -> dict[str, Callable[[Pixels, RestoreConfig], Pixels]]:
    """Open all methods; plans: name in `OURS` -> file."""
    eager = stack.enter_context(Restorer.from_base(base, device="cpu"))
    compiled = stack.enter_context(Restorer.from_base(base, device="cpu"))
    for session in compiled.sessions.values():
        session.module = torch.compile(session.module)  # type: ignore[attr-defined]

    def half(pixels: Pixels, config: RestoreConfig) -> Pixels:
        with torch.autocast("cpu", torch.bfloat16):
            return eager.restore(pixels, config)

    calls: dict[str, Callable[[Pixels, RestoreConfig], Pixels]] = {
        EAGER: eager.restore,
        "compile fp32": compiled.restore,
    }
    if has_native_bf16(cpu=True):  # an image takes fifty times as long with emulated bf16
        calls["eager bf16"] = half
    for name, (backend, provider) in OURS.items():
        try:
            calls[name] = stack.enter_context(Restorer.from_plan(plans[name], backend, provider=provider)).restore
        except MissingBackendError as error:  # some processors do not support bf16
            click.echo(f"{name}: left out: {error}", err=True)
    return calls


def cold(name: str, engine: str | None, base: str, size: int) -> dict[str, Any]:
    """Restore an image in a new process."""
    if name not in (EAGER, *OURS):
        return {"cold_s": "", "cold_peak_mb": ""}
    chosen = ["--base", base]
    if engine:
        backend, provider = OURS[name]
        chosen = ["--engine", engine, "--backend", backend, *(["--provider", provider] if provider else [])]
    with TemporaryDirectory() as folder:
        save_image(Path(folder) / "a.png", sample(size)[1])
        started, peak = time.perf_counter(), 0
        process = psutil.Popen(
            [sys.executable, "-m", "pfstorer_rt", "restore", *chosen, f"{folder}/a.png", "-o", f"{folder}/b.png"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.02)
        process.wait()
        if not Path(folder, "b.png").exists():
            raise click.ClickException(f"{name}: the new process restored nothing")
        return {"cold_s": round(time.perf_counter() - started, 2), "cold_peak_mb": round(peak / 1e6)}


NAMES = {
    "eager fp32": "PyTorch, eager fp32",
    "compile fp32": "PyTorch, `torch.compile`",
    "eager bf16": "PyTorch, eager bf16",
    "onnxruntime": "ONNX Runtime fp32",
    "openvino f32": "OpenVINO fp32",
    "openvino bf16": "OpenVINO bf16",
    "onnxruntime int8": "ONNX Runtime, int8 plan",
    "openvino int8": "OpenVINO, int8 plan",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table: time, speed-up and PSNR of every size, and the start of a new process."""
    sizes = by(rows, "size")
    first = next(iter(sizes))
    heads = [f"{size} x {size}: s | speed-up | PSNR dB" for size in sizes]
    lines = [line(["", *heads, f"{first} x {first}, new process: s", "peak memory MB"])]
    lines.append(line(["---"] * (3 * len(sizes) + 3)))
    for name, measured in by(rows, "name").items():
        cells = [f"{float(r['p50']):.2f} | {float(r['ratio']):.2f} | {float(r['psnr']):.2f}" for r in measured]
        lines.append(line([NAMES[name], *cells, measured[0]["cold_s"], measured[0]["cold_peak_mb"]]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
