"""Measure size and build time of TensorRT-RTX engines of the denoiser, by layout of batch sizes.

    python benchmarks/engines.py -o benchmarks/results/engines.csv [--base portrait|DIR|sd21]

Needs no GPU. Rows: one batch size, several profiles in one engine, one engine per batch size, one profile over all
batch sizes. `fused_attention` counts attention layers with a fused kernel, once per profile, from the kernel sources in
the engine; `fp32_scores` counts the fused kernels that accumulate q k^T in fp32. `sd21` is a base of Stable Diffusion
2.1's size with random weights.
"""

from __future__ import annotations

import csv
import gc
import re
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from common import machine
from pfstorer_rt.export import tensorrt
from pfstorer_rt.export.build import halve_weights
from pfstorer_rt.export.graph import build_graph, fuse
from pfstorer_rt.export.tensorrt import BuildOptions, EngineBuilder

from pfstorer_rt.config import PRESETS
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.models.components import denoiser

LADDER = (1, 2, 4, 8)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--base", "name", default="portrait", show_default=True, help="A base, or a preset with random weights.")
@click.option("--layout", "layouts", multiple=True, help="one, ladder, each, range. [default: all]")
def main(output: Path, name: str, layouts: tuple[str, ...]) -> None:
    base = build_base(name) if name in PRESETS and name != "portrait" else load_base(name)
    halve_weights(base)
    rows = []
    with TemporaryDirectory() as folder:
        graph = build_graph(fuse(denoiser(base)), "fp16")
        model, origins = graph.save(Path(folder)), graph.origins
        tile = base.config.tile
        del graph, base
        gc.collect()
        for layout in layouts or ("one", "ladder", "each", "range"):
            rows.append({"base": name, "layout": layout, **measure(layout, model, origins, tile, Path(folder))})
            click.echo("  ".join(f"{k} {v}" for k, v in list(rows[-1].items())[:8]))
    new = not output.exists()
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def measure(layout: str, model: Path, origins: dict[str, str], tile: int, folder: Path) -> dict[str, Any]:
    """Build the engines of one layout; returns a row of the CSV file."""
    ladders = {"one": [(1,)], "ladder": [LADDER], "each": [(b,) for b in LADDER], "range": [LADDER]}[layout]
    plan, started, size, fused, wide = tensorrt.plan_profiles, time.perf_counter(), 0, 0, 0
    if layout == "range":
        tensorrt.plan_profiles = one_range
    try:
        for batches in ladders:
            file = folder / "engine"
            builder = EngineBuilder("tensorrt-rtx", BuildOptions(batches=batches))
            builder.build("denoiser", origins, model, tile, {}, file)
            data = file.read_bytes()
            size += len(data)
            kernels = re.findall(rb"using Kernel_traits = fmha::\w+<\s*fmha::(\w+)", data)
            fused += len(kernels)
            wide += sum(b"fp32" in kernel or b"bf16" in kernel for kernel in kernels)
    finally:
        tensorrt.plan_profiles = plan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "megabytes": round(size / 1e6, 1),
        "build_s": round(time.perf_counter() - started, 1),
        "fused_attention": fused,
        "fp32_scores": wide,
        "peak_memory_gb": round(peak / 1e9, 2),
        "tensorrt_rtx": builder.library.version,
        **machine(),
    }


def one_range(
    inputs: dict[str, list[int]], tile: int, scales: Mapping[str, int], options: BuildOptions
) -> list[dict[str, list[list[int]]]]:
    """Return one profile from the smallest to the largest batch, tuned for four."""
    sizes = (min(options.batches), 4, max(options.batches))
    return [{n: [[b if d == -1 else d for d in s] for b in sizes] for n, s in inputs.items() if -1 in s}]


if __name__ == "__main__":
    main()
