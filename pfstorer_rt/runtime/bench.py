"""Time a plan on this machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfstorer_rt.config import RestoreConfig
    from pfstorer_rt.runtime.restorer import Restorer


RUNS_NEEDED = {50: 1, 90: 10, 99: 100}
"""Percentile -> number of runs from which it is reported. With fewer runs it would equal the slowest run."""
LEAST_RUNS = 3
"""Runs of each measurement that the time limit does not prevent."""
SIZES = (512, 1024, 2048, 4096)
"""Sides of the square images, in pixels."""


@dataclass(frozen=True)
class BenchConfig:
    """Settings of the measurements."""

    backend: str = "auto"
    provider: str | None = None
    steps: int | None = None
    """Diffusion steps; None selects the engine's default."""
    runs: int = 20
    """Largest number of runs of each measurement."""
    seconds: float = 30.0
    """Time limit of each measurement; three runs are made in any case."""
    sizes: tuple[int, ...] = SIZES
    trust: bool = False
    """Run a TensorRT plan (executable code) that was built elsewhere."""


@dataclass(frozen=True)
class BenchReport:
    """The measurements, and the machine that they were made on."""

    engine: str
    backend: str
    provider: str
    steps: int
    sampler: str
    tile: int
    """Side of a tile in pixels."""
    cold_start_s: float
    components_ms: dict[str, dict[str, float]]
    """Name of a component -> percentiles in milliseconds (`percentiles`), and the number of runs."""
    images_ms: dict[str, dict[str, float]]
    """Name of an image size -> the same values, with megapixels and tiles per second."""
    peak_memory_mb: float
    machine: dict[str, Any]
    clock: dict[str, Any]
    method: str
    """How the values were measured."""


def measure_plan(
    engine: str | Path, config: BenchConfig | None = None, on_start: Callable[[str], None] = lambda _: None
) -> BenchReport:
    """Time a plan on this machine: its cold start, each component, and whole images.

    on_start: called with the name of every measurement before it begins.
    """
    import numpy as np

    from pfstorer_rt.config import RestoreConfig
    from pfstorer_rt.runtime.restorer import Restorer

    config = config or BenchConfig()
    restoring, rng, load = RestoreConfig(steps=config.steps, coarse="off"), np.random.default_rng(0), os.getloadavg()[0]
    on_start("cold start")
    started = time.perf_counter()
    with Restorer.from_plan(engine, config.backend, trust=config.trust, provider=config.provider) as restorer:
        tile, recipe = restorer.manifest.tile, restorer.recipe(restoring)
        restorer.restore(rng.random((tile, tile, 3), np.float32), restoring)
        cold = time.perf_counter() - started
        components = {}
        for name, call in component_calls(restorer).items():
            on_start(name)
            components[name] = percentiles(call, config.runs, config.seconds)
        images = {}
        for side in dict.fromkeys(config.sizes):
            on_start(f"image {side}x{side}")
            images[f"image {side}x{side}"] = time_image(restorer, side, restoring, config)
        return BenchReport(
            str(engine),
            restorer.backend,
            restorer.provider,
            recipe.steps,
            recipe.sampler,
            tile,
            cold,
            components,
            images,
            peak_memory_mb(),
            machine(),
            clock(load),
            describe_method(config),
        )


def describe_method(config: BenchConfig) -> str:
    """Return one line on how the values of a report were measured."""
    end = (
        f"after {config.runs} runs"
        if config.runs <= LEAST_RUNS
        else (f"after {config.runs} runs, or after {LEAST_RUNS} or more runs that take {config.seconds:g} s")
    )
    return (
        "wall clock. cold start: from opening the plan to the first result, without the start of Python. "
        f"each measurement: one warm-up run, then it ends {end}. p90 needs 10 runs, p99 needs 100. "
        "images: random noise. peak memory: of the whole process. tiles: passes through the denoiser"
    )


def time_image(restorer: Restorer, side: int, restoring: RestoreConfig, config: BenchConfig) -> dict[str, float]:
    """Time whole restorations of a square image."""
    import numpy as np

    pixels = np.random.default_rng(side).random((side, side, 3), np.float32)
    figures = percentiles(lambda: restorer.restore(pixels, restoring), config.runs, config.seconds)
    layout = restorer.layout(side, side, restoring)
    tiles = layout.denoiser_tiles * layout.recipe.steps
    rates = {"megapixels_per_s": side * side / 1e3 / figures["p50"], "tiles_per_s": tiles * 1e3 / figures["p50"]}
    return {**figures, **rates}


def component_calls(restorer: Restorer) -> dict[str, Callable[[], Any]]:
    """Return calls that pass one tile through each component, and four tiles through the denoiser at once."""
    import numpy as np

    m, sessions = restorer.manifest, restorer.sessions
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
        decoded["cfw_weight"] = np.full(1, m.cfw_weight, np.float32)
    return {
        "encoder": lambda: sessions["encoder"].run(image=image),
        "denoiser": denoise(1),
        "denoiser, 4 tiles": denoise(4),
        "decoder": lambda: sessions["decoder"].run(**decoded),
    }


def percentiles(call: Callable[[], Any], runs: int, seconds: float) -> dict[str, float]:
    """Call once to warm up, then at most `runs` times.

    Returns the percentiles in milliseconds that the number of runs supports (`RUNS_NEEDED`), and `runs`.
    """
    import numpy as np

    call()
    times: list[float] = []
    while len(times) < runs and (len(times) < LEAST_RUNS or sum(times) < seconds * 1e3):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    supported = [p for p, needed in RUNS_NEEDED.items() if len(times) >= needed]
    return {**{f"p{p}": float(np.percentile(times, p)) for p in supported}, "runs": len(times)}


def clock(load_before: float) -> dict[str, Any]:
    """Return the state of the processor: frequency, governor, and the load before and after."""
    import psutil

    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return {
        "mhz": round(frequency.current) if frequency else "unknown",
        "governor": governor.read_text().strip() if governor.is_file() else "unknown",
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def machine() -> dict[str, Any]:
    """Return the hardware and the versions of the measurements."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("pfstorer-rt", "torch", "onnxruntime", "openvino", "numpy")},
    }


def installed(package: str) -> str:
    """Return the version of a package, or `none` when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
