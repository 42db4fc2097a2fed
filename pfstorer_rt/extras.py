"""Optional packages: the extra of `pfstorer-rt` that installs each package, and the error for a missing package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pfstorer_rt.errors import MissingBackendError

_TRAIN = ("accelerate", "diffusers", "torch", "transformers")
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "train": _TRAIN,
    "export": (*_TRAIN, "onnx", "onnx_ir", "onnxscript", "polygraphy"),
    "metrics": ("torch", "dlib", "face_recognition_models", "skimage", "stlpips_pytorch"),
    "heif": ("pillow_heif",),
    "studio": ("gradio", "scipy", "uvicorn"),
    "encrypt": ("cryptography",),
    "openvino": ("openvino",),
    "gpu": ("torch", "bitsandbytes", "triton", "xformers"),
    "tensorrt": ("torch", "tensorrt"),
    "tensorrt-rtx": ("torch", "tensorrt_rtx"),
}
"""Extra -> import names of its packages."""


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'pfstorer-rt[{extra}]'"


def missing(what: str, error: ModuleNotFoundError, extra: str | None = None) -> MissingBackendError:
    """Return the error for a missing package, with the extra that installs it.

    what: subject of the message, such as a command. extra: the extra that `what` needs, or `all`; it is named if it
    contains the package, else the first extra with the package.
    Raises `error` if the package belongs to no extra.
    """
    package = (error.name or "").partition(".")[0]
    owners = [name for name, packages in EXTRAS.items() if package in packages]
    if not owners:
        raise error
    named = extra if extra and extra in (*owners, "all") else owners[0]
    return MissingBackendError(f"{what} needs the {named} extra: {install(named)}")


@contextmanager
def needed_by(what: str, extra: str | None = None) -> Iterator[None]:
    """Convert the import error of an optional package to a `MissingBackendError`; arguments as for `missing`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(what, error, extra) from error
