"""The optional packages: which extra of `pfstorer-rt` installs each of them, and the error where one is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pfstorer_rt.errors import MissingBackendError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": ("accelerate", "diffusers", "transformers"),
    "export": ("onnx", "onnx_ir", "onnxscript", "polygraphy"),
    "metrics": ("dlib", "face_recognition_models", "skimage", "stlpips_pytorch"),
    "openvino": ("openvino",),
    "gpu": ("bitsandbytes", "triton", "xformers"),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx",),
}
"""Extra -> import names of the packages that it adds to the runtime."""


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'pfstorer-rt[{extra}]'"


def missing(what: str, error: ModuleNotFoundError, extra: str | None = None) -> MissingBackendError:
    """Return the error that names the extra of a package that could not be imported.

    what: the subject of the message, such as a command. extra: the extra to name instead of the package's own.
    Raises `error` itself when the package belongs to no extra.
    """
    package = (error.name or "").partition(".")[0]
    owners = [name for name, packages in EXTRAS.items() if package in packages]
    if not owners:
        raise error
    extra = extra or owners[0]
    return MissingBackendError(f"{what} needs the {extra} extra: {install(extra)}")


@contextmanager
def needed_by(what: str, extra: str | None = None) -> Iterator[None]:
    """Turn a missing optional package into the `MissingBackendError` that names its extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(what, error, extra) from error
