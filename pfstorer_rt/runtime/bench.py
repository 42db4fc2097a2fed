"""Time a plan on this machine."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfstorer_rt.runtime.restorer import Restorer


METHOD = (
    "wall clock; cold: opening the plan to the first picture, Python's own start not counted; warm: percentiles "
    "over the runs after one warm-up, which end once --runs are done or, after three, --seconds have passed; noise "
    "pictures; peak memory of the whole process so far; tiles are the denoiser's, counted once a step"
)
SIZES = (512, 1024, 2048, 4096)


def measure(
    engine: str,
    backend: str = "auto",
    provider: str | None = None,
    steps: int | None = None,
    runs: int = 20,
    seconds: float = 30.0,
    sizes: tuple[int, ...] = SIZES,
    trust_plan: bool = False,
) -> dict[str, Any]:
    """Measure everything that `bench` prints; times in milliseconds unless a name says otherwise."""
    import numpy as np

    from pfstorer_rt.config import RestoreConfig
    from pfstorer_rt.runtime.restorer import Restorer

    config, rng, load = RestoreConfig(steps=steps), np.random.default_rng(0), os.getloadavg()[0]
    started = time.perf_counter()
    with Restorer.from_plan(engine, backend, trust=trust_plan, provider=provider) as restorer:
        tile, recipe = restorer.manifest.tile, restorer.recipe(config)
        restorer.restore(rng.random((tile, tile, 3), np.float32), config)
        cold = time.perf_counter() - started
        components = time_components(restorer, runs, seconds)
        whole = {}
        for n in dict.fromkeys(sizes):
            pixels = rng.random((n, n, 3), np.float32)
            figures = percentiles(lambda p=pixels: restorer.restore(p, config), runs, seconds)  # type: ignore[misc]
            tiles = restorer.layout(n, n, config).denoiser_tiles * recipe.steps
            rates = {"megapixels_per_s": n * n / 1e3 / figures["p50"], "tiles_per_s": tiles * 1e3 / figures["p50"]}
            whole[f"picture {n}x{n}"] = {**figures, **rates}
        return {
            "engine": engine,
            "backend": restorer.backend,
            "provider": restorer.provider,
            "steps": recipe.steps,
            "sampler": recipe.sampler,
            "tile": tile,
            "cold_start_s": cold,
            "components_ms": components,
            "pictures_ms": whole,
            "peak_memory_mb": peak_memory_mb(),
            "machine": machine(),
            "clock": clock(load),
            "method": METHOD,
        }


def time_components(restorer: Restorer, runs: int, seconds: float) -> dict[str, dict[str, float]]:
    """Time one tile through each component, and four through the denoiser at once."""
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
    calls: dict[str, Callable[[], Any]] = {
        "encoder": lambda: sessions["encoder"].run(image=image),
        "denoiser": denoise(1),
        "denoiser, 4 tiles": denoise(4),
        "decoder": lambda: sessions["decoder"].run(**decoded),
    }
    return {name: percentiles(call, runs, seconds) for name, call in calls.items()}


def percentiles(call: Callable[[], Any], runs: int, seconds: float) -> dict[str, float]:
    """Call once to warm up, then at most `runs` times; returns p50, p90 and p99 in milliseconds, and how many ran."""
    import numpy as np

    call()
    times: list[float] = []
    while len(times) < runs and (len(times) < 3 or sum(times) < seconds * 1e3):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return {**{f"p{p}": float(np.percentile(times, p)) for p in (50, 90, 99)}, "runs": len(times)}


def clock(load_before: float) -> dict[str, Any]:
    """Return what tells a quiet machine at full speed from another: frequency, governor, load before and after."""
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
    """Return the hardware and the versions that a figure belongs to."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("pfstorer-rt", "torch", "onnxruntime", "openvino", "numpy")},
    }


def installed(package: str) -> str:
    """Return a package's version, `none` where it is not installed."""
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
