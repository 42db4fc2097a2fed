"""Examine a machine: the hardware, the installed packages, and the backends that can run here."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from pfstorer_rt.errors import BadFileError, MissingBackendError

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


@dataclass(frozen=True)
class Diagnosis:
    """The state of this machine. A backend maps to None when it can run, else to the reason why it cannot."""

    machine: dict[str, object]
    """System, cores, GPU, memory in GB, Python version."""
    extras: dict[str, str | None]
    """Groups of optional packages."""
    engines: dict[str, str | None]
    """Backends that run plans and bases."""
    builders: dict[str, str | None]
    """Libraries that build TensorRT engines."""
    attention: dict[str, str | None]
    """Backends of attention in PyTorch."""
    metrics: dict[str, str | None]
    bases: list[str]
    """Names of the shipped bases."""
    home: str
    """The user's data directory."""
    home_refusal: str | None
    """Why the identities in the data directory cannot be listed, or None when they can."""
    identities: int
    """Number of identities in the data directory."""
    packages: dict[str, str | None]
    """Installed versions; None for a package that is not installed."""


def diagnose() -> Diagnosis:
    """Examine this machine: its hardware, the installed packages, and the backends that can run."""
    from pfstorer_rt.base_files import shipped_bases
    from pfstorer_rt.engine.session import BACKENDS, choose_backend
    from pfstorer_rt.extras import EXTRAS
    from pfstorer_rt.faces.dlib import INSTALL_METRICS, face_models
    from pfstorer_rt.files import home
    from pfstorer_rt.identity import list_identities

    gpu = gpu_name()
    try:
        identities, home_refusal = len(list_identities()), None
    except BadFileError as error:
        identities, home_refusal = 0, str(error)
    backends = {name: partial(choose_backend, name, backend.targets[0]) for name, backend in BACKENDS.items()}
    return Diagnosis(
        machine={
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "gpu": gpu,
            "memory_gb": memory_gb(),
            "python": platform.python_version(),
        },
        extras={name: absent(name) for name in EXTRAS},
        engines={
            "torch": absent("train"),
            **{name: refusal(choose) for name, choose in backends.items()},
            **onnxruntime_on_cuda(),
        },
        builders={name: refusal(partial(load_builder, name)) for name in BACKENDS["tensorrt"].targets},
        attention=attention_refusals("cuda" if gpu else "cpu"),
        metrics={
            "psnr": None,
            "ssim": None if find_spec("skimage") else f"missing: {INSTALL_METRICS}",
            "identity (dlib)": None if face_models() else f"missing: {INSTALL_METRICS}",
            "st-lpips": None if find_spec("stlpips_pytorch") else f"missing: {INSTALL_METRICS}",
        },
        bases=shipped_bases(),
        home=str(home()),
        home_refusal=home_refusal,
        identities=identities,
        packages={name: installed(name) for name in PACKAGES},
    )


def absent(extra: str) -> str | None:
    """Return which packages of an extra are missing and how to install them, or None when all are installed."""
    from pfstorer_rt.extras import EXTRAS, install

    packages = [name for name in EXTRAS[extra] if find_spec(name) is None]
    return f"{', '.join(packages)} missing: {install(extra)}" if packages else None


def gpu_name() -> str | None:
    """Return the name of the GPU that PyTorch uses, or None without a GPU or without PyTorch."""
    if find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def onnxruntime_on_cuda() -> dict[str, str | None]:
    """Return whether ONNX Runtime can use CUDA, for an installation with this provider."""
    from pfstorer_rt.engine import onnxruntime as engine

    if find_spec("onnxruntime") is None:
        return {}
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return {"onnxruntime on CUDA": engine.cuda_refusal()} if engine.CUDA in available else {}


def load_builder(target: str) -> None:
    """Import the library that builds engines of a target; raises `MissingBackendError` when it is not installed."""
    from pfstorer_rt.extras import needed_by

    with needed_by(target, target):
        from pfstorer_rt.engine.tensorrt import load_library

        load_library(target)


def attention_refusals(device: str) -> dict[str, str | None]:
    """Return for each attention backend why it cannot run on a device, or None when it can; {} without PyTorch."""
    if find_spec("torch") is None:
        return {}
    from pfstorer_rt.ops import BACKENDS, choose

    return {name: refusal(partial(choose, name, device)) for name in BACKENDS}


def refusal(attempt: Callable[[], object]) -> str | None:
    """Return why an attempt fails with a `MissingBackendError`, or None when it succeeds."""
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
    """Return a package's version, or None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
