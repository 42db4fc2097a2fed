"""`pfstorer-rt doctor`."""

from __future__ import annotations

import json
import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import click

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "triton",
    "xformers",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "polygraphy",
    "dlib-bin",
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Say what this machine can run, and what to install for more.

    \b
    Example:
      pfstorer-rt doctor
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(report))
        return
    machine = report["machine"]
    click.echo(
        f"machine   {machine['system']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"Python {machine['python']}"
    )
    click.echo(f"gpu       {machine['gpu'] or 'none visible to torch'}")
    for key in ("extras", "engines", "builders", "attention", "metrics"):
        for name, refusal in report[key].items():
            title = key.removesuffix("s") if key != "metrics" else key
            click.echo(f"{title:<9} {name}: {'ready' if refusal is None else refusal}")
    click.echo(f"bases     {', '.join(report['bases']) or 'none shipped'}")
    click.echo(f"home      {report['home']} ({report['identities']} identities)")
    click.echo("packages  " + ", ".join(f"{k} {v}" for k, v in report["packages"].items() if v))


def examine() -> dict[str, Any]:
    """Collect everything that `doctor` prints; a refusal of None means ready."""
    import torch

    from pfstorer_rt.base_files import shipped_bases
    from pfstorer_rt.engine.session import BACKENDS
    from pfstorer_rt.engine.tensorrt import TARGETS, load_library
    from pfstorer_rt.extras import EXTRAS
    from pfstorer_rt.faces.dlib import INSTALL_METRICS, face_models
    from pfstorer_rt.files import home
    from pfstorer_rt.identity import list_identities

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    engines: dict[str, str | None] = {name: refusal(import_module(m).check) for name, m in BACKENDS.items()}
    return {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "gpu": gpu,
            "memory_gb": memory_gb(),
            "python": platform.python_version(),
        },
        "extras": {name: absent(name) for name in EXTRAS},
        "engines": {"torch": absent("train"), **engines},
        "builders": {name: refusal(lambda name=name: load_library(name)) for name in TARGETS},
        "attention": attention_refusals("cuda" if gpu else "cpu"),
        "metrics": {
            "psnr": None,
            "ssim": None if find_spec("skimage") else f"missing: {INSTALL_METRICS}",
            "identity (dlib)": None if face_models() else f"missing: {INSTALL_METRICS}",
            "st-lpips": None if find_spec("stlpips_pytorch") else f"missing: {INSTALL_METRICS}",
        },
        "bases": shipped_bases(),
        "home": str(home()),
        "identities": len(list_identities()),
        "packages": {name: installed(name) for name in PACKAGES},
    }


def absent(extra: str) -> str | None:
    """Return which packages of an extra are missing and how to install them, None when all are here."""
    from pfstorer_rt.extras import EXTRAS, install

    packages = [name for name in EXTRAS[extra] if find_spec(name) is None]
    return f"{', '.join(packages)} missing: {install(extra)}" if packages else None


def attention_refusals(device: str) -> dict[str, str | None]:
    """Return for each attention backend why it is refused on a device, None when it is not."""
    from pfstorer_rt.ops import BACKENDS, choose

    return {name: refusal(lambda name=name: choose(name, device)) for name in BACKENDS}


def refusal(attempt: Any) -> str | None:
    """Return the reason with which an attempt is refused, None when it is not."""
    from pfstorer_rt.errors import MissingBackendError

    try:
        attempt()
    except MissingBackendError as error:
        return str(error)
    return None


def memory_gb() -> float:
    """Return the machine's memory in GB."""
    import psutil

    return round(psutil.virtual_memory().total / 1e9, 1)


def installed(name: str) -> str | None:
    """Return a package's version, None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
