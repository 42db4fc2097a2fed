"""Compare the time of kernels with the measured limits of the GPU; each kernel's benchmark defines its cases.

The limits come from a product of large half-precision matrices and a copy of a large buffer on the same GPU. The share
of a kernel is the time that its operations or its bytes would take at these limits, whichever is longer, divided by its
time.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from common import machine

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SECONDS = 1e-3


@dataclass(frozen=True)
class Case:
    """One shape, its minimum cost, and the methods that compute it."""

    shape: Mapping[str, Any]
    operations: float
    """Number of multiplications and additions in the definition."""
    bytes: float
    """Bytes of all inputs, read once, and of all outputs, written once."""
    ways: Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Limits:
    """Measured limits of the GPU."""

    operations: float
    """Operations per second in half-precision matrix products."""
    bytes: float
    """Bytes per second, read and written."""

    def milliseconds(self, case: Case) -> float:
        """Return the shortest possible time of a case in seconds."""
        return max(case.operations / self.operations, case.bytes / self.bytes) / SECONDS


def need_gpu() -> str:
    """Return the name of the GPU; raises without one."""
    if not torch.cuda.is_available():
        nvidia = "its driver is there" if shutil.which("nvidia-smi") else "no NVIDIA driver was found"
        raise click.ClickException(
            f"this benchmark times kernels on an NVIDIA GPU, and torch sees none ({nvidia}; torch "
            f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'the CPU alone'}"
            "). Nothing was measured. On a machine with one: pip install 'pfstorer-rt[gpu]', then the same command."
        )
    return torch.cuda.get_device_name()


def milliseconds(way: Callable[[], Any]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile of a call's time, after a warm-up and with a cold L2 cache."""
    import triton

    low, middle, high = triton.testing.do_bench(way, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
    return low, middle, high


def measure_limits() -> Limits:
    """Time a product of 8192 x 8192 half-precision matrices and a copy of 1 GiB."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.float16) for _ in range(2))
    source, target = torch.empty(2, 1 << 30, dtype=torch.uint8)
    product, copy = milliseconds(lambda: a @ b)[1], milliseconds(lambda: target.copy_(source))[1]
    return Limits(2 * n**3 / (product * SECONDS), 2 * len(source) / (copy * SECONDS))


def xformers_or_none() -> Any:
    """Return `xformers.ops`, or None when it is not installed."""
    try:
        import xformers.ops
    except ImportError:
        return None
    return xformers.ops


def versions() -> dict[str, str]:
    """Return the versions of the compared packages."""
    found = {}
    for name in ("torch", "triton", "xformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return {**found, "cuda": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version() or "")}


def measure(kernel: str, cases: Iterable[Case], output: Path) -> None:
    """Time every method of every case, print the rows and append them to a CSV file.

    A method that does not support a case, such as some of torch's backends, gets a row with its reason and no time.
    """
    gpu = need_gpu()
    with torch.device("cuda"):
        limits = measure_limits()
        click.echo(f"{gpu}: {limits.operations / 1e12:.0f} TFLOPS, {limits.bytes / 1e9:.0f} GB/s measured")
        for case in cases:
            click.echo(", ".join(f"{k} {v}" for k, v in case.shape.items()))
            rows = [{"kernel": kernel, "way": n, **timed(n, way, case, limits)} for n, way in case.ways.items()]
            write(output, [{**row, **machine(), "gpu": gpu, **versions()} for row in rows])


def timed(name: str, way: Callable[[], Any], case: Case, limits: Limits) -> dict[str, Any]:
    """Time one method; returns the columns of its row."""
    row: dict[str, Any] = {
        "shape": " ".join(f"{k}={v}" for k, v in case.shape.items()),
        "operations": case.operations,
        "bytes": case.bytes,
        "limit_tflops": round(limits.operations / 1e12, 1),
        "limit_gbps": round(limits.bytes / 1e9, 1),
    }
    try:
        low, middle, high = milliseconds(way)
    except Exception as error:  # libraries raise many error types
        reason = str(error).strip().splitlines()
        click.echo(f"  {name:<28} refused: {reason[0] if reason else type(error).__name__}")
        return {**row, "p20_ms": "", "p50_ms": "", "p80_ms": "", "share": "", "refused": " ".join(reason)[:200]}
    share = limits.milliseconds(case) / middle
    click.echo(f"  {name:<28} {middle:8.4f} ms  {100 * share:5.1f} % of the limit")
    times = {"p20_ms": round(low, 5), "p50_ms": round(middle, 5), "p80_ms": round(high, 5)}
    return {**row, **times, "share": round(share, 4), "refused": ""}


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file."""
    new = not output.exists()
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
