"""`pfstorer-rt bench`."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pfstorer_rt.restore import Restorer

METHOD = (
    "wall clock; cold: opening the plan to the first picture, Python's own start not counted; warm: percentiles "
    "over the runs after one warm-up; peak memory of the whole process"
)


@click.command()
@click.option("--engine", required=True, type=click.Path(), help="Plan file.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "openvino", "tensorrt", "torch"]),
    default="auto",
    show_default=True,
)
@click.option("--steps", type=click.IntRange(1, 1000), help="Diffusion steps. [default: the engine's own]")
@click.option("--runs", type=click.IntRange(2), default=10, show_default=True)
@click.option("--size", type=click.IntRange(1), multiple=True, help="Side of a square picture. [default: a tile, 512]")
@click.option("--trust-plan", is_flag=True, help="Run a TensorRT plan (executable code) that others built.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    engine: str, backend: str, steps: int | None, runs: int, size: tuple[int, ...], as_json: bool, trust_plan: bool
) -> None:  # fmt: skip
    """Time a plan on this machine: cold start, each component, whole pictures.

    \b
    Example:
      pfstorer-rt bench --engine alice.plan --json
    """
    report = measure(engine, backend, steps, runs, size, trust_plan)
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(f"{report['backend']} on {report['provider']}, {report['steps']} steps of {report['sampler']}")
    click.echo(f"cold start {report['cold_start_s']:.2f} s, peak memory {report['peak_memory_mb']:.0f} MB")
    for name, figures in {**report["components_ms"], **report["pictures_ms"]}.items():
        more = f"  {figures['megapixels_per_s']:.3f} MP/s" if "megapixels_per_s" in figures else ""
        click.echo(f"{name:<18} p50 {figures['p50']:8.1f} ms  p90 {figures['p90']:8.1f} ms{more}")
    click.echo(METHOD)


def measure(
    engine: str, backend: str, steps: int | None, runs: int, sizes: tuple[int, ...], trust: bool = False
) -> dict[str, Any]:
    """Measure everything that `bench` prints; times in milliseconds unless a name says otherwise."""
    import numpy as np

    from pfstorer_rt.config import RestoreConfig
    from pfstorer_rt.restore import Restorer

    config, rng = RestoreConfig(steps=steps), np.random.default_rng(0)
    started = time.perf_counter()
    with Restorer.from_plan(engine, backend, trust=trust) as restorer:
        tile = restorer.manifest.tile
        pictures = {n: rng.random((n, n, 3), np.float32) for n in dict.fromkeys(sizes or (tile, 512))}
        restorer.restore(next(iter(pictures.values())), config)
        cold = time.perf_counter() - started
        whole = {}
        for n, pixels in pictures.items():
            figures = percentiles(lambda p=pixels: restorer.restore(p, config), runs)  # type: ignore[misc]
            whole[f"picture {n}x{n}"] = {**figures, "megapixels_per_s": n * n / 1e3 / figures["p50"]}
        return {
            "engine": engine, "backend": restorer.backend, "provider": restorer.provider,
            "steps": restorer.steps(config), "sampler": restorer.sampler(config), "tile": tile, "runs": runs,
            "cold_start_s": cold, "components_ms": time_components(restorer, runs), "pictures_ms": whole,
            "peak_memory_mb": peak_memory_mb(), "machine": machine(), "method": METHOD,
        }  # fmt: skip


def time_components(restorer: Restorer, runs: int) -> dict[str, dict[str, float]]:
    """Time one tile through each component, and four through the denoiser at once."""
    import numpy as np

    m, sessions = restorer.manifest, restorer._sessions
    side = m.tile // m.factor
    latent = np.zeros((1, m.latent_channels, side, side), np.float32)
    image = np.zeros((1, 3, m.tile, m.tile), np.float32)
    strength = {"strength": np.ones(1, np.float32)} if "strength" in sessions["denoiser"].inputs else {}

    def denoise(batch: int) -> Callable[[], Any]:
        x = np.repeat(latent, batch, 0)
        return lambda: sessions["denoiser"].run(x=x, z_lq=x, t=np.full(batch, 500, np.float32), **strength)

    encoded = sessions["encoder"].run(image=image)
    decoded = {"latent": latent, **{name: a for name, a in encoded.items() if name in sessions["decoder"].inputs}}
    if m.cfw:
        decoded["cfw_weight"] = np.zeros(1, np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "encoder": lambda: sessions["encoder"].run(image=image),
        "denoiser": denoise(1), "denoiser, 4 tiles": denoise(4),
        "decoder": lambda: sessions["decoder"].run(**decoded),
    }  # fmt: skip
    return {name: percentiles(call, runs) for name, call in calls.items()}


def percentiles(call: Callable[[], Any], runs: int) -> dict[str, float]:
    """Call once to warm up, then `runs` times; returns p50, p90 and p99 in milliseconds."""
    import numpy as np

    call()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return {f"p{p}": float(np.percentile(times, p)) for p in (50, 90, 99)}


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def machine() -> dict[str, Any]:
    """Return the hardware and the versions that a figure belongs to."""
    packages = ("pfstorer-rt", "torch", "onnxruntime", "numpy")
    return {
        "processor": processor(), "cores": os.cpu_count(), "system": platform.platform(),
        "python": platform.python_version(), **{name: version(name) for name in packages},
    }  # fmt: skip


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
