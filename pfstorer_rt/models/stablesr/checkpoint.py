"""Read untrusted checkpoints without executing pickled code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.files import show_path
from pfstorer_rt.models.stablesr.conversion import Tensors

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", f"{kind}Storage") for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool", "Byte")),
    *(("torch", name) for name in ("Size", "float16", "bfloat16", "float32", "float64", "int64")),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "complex")),
}
_INERT = ("pytorch_lightning.", "lightning.", "torchmetrics.", "omegaconf.", "numpy.", "argparse.")


def _encode(text: str, encoding: str) -> bytes:
    """Take the place of `_codecs.encode`, with which Python pickles bytes; some other encodings take hours."""
    if encoding != "latin1":
        raise BadFileError(f"the checkpoint contains text in the encoding {encoding[:80]!r}; expected latin1")
    return text.encode("latin1")


class Stub:
    """A placeholder for training objects in a checkpoint, such as Lightning's: it accepts any value and does nothing.

    It replaces the class, so the class is never imported.
    """

    def __init__(self, *arguments: object, **named: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """Accept an item, like a list."""

    def extend(self, values: object) -> None:
        """Accept items, like a list."""


class RestrictedUnpickler(pickle._Unpickler):
    """Unpickles tensors and plain containers; it refuses every other class, so no code can run.

    The unpickler in Python keeps its memo in a dictionary. The one in C allocates an array up to the largest index, so
    a file of 300 bytes can take 34 GB.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class, or a stub for a Lightning class; raises `BadFileError` for any other class."""
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if f"{module}.".startswith(_INERT):
            return Stub
        raise BadFileError(f"the checkpoint wants to run {module}.{name}; only tensors and containers are read")


def _restricted() -> ModuleType:
    """Return a pickle module for torch.load with the restricted unpickler and without the plain `load`."""
    module = ModuleType("restricted_pickle")
    module.Unpickler = RestrictedUnpickler  # type: ignore[attr-defined]
    module.load = lambda file, **options: RestrictedUnpickler(file, **options).load()  # type: ignore[attr-defined]
    return module


def refuse_programs(path: Path) -> None:
    """Raise `BadFileError` for a TorchScript archive: `torch.load` runs its code, which can write any file.

    `torch.load` detects these archives by the same entry, with the same reader.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise BadFileError("a TorchScript program; expected a checkpoint of tensors, as torch.save writes it")


def read_checkpoint(path: Path) -> Tensors:
    """Read a `.ckpt`/`.pt` (memory-mapped, nothing executed) or `.safetensors` file's tensors by key.

    Raises `BadFileError` when the file is missing or damaged, contains no tensors, or contains other classes.
    """
    if path.is_dir():
        raise BadFileError(f"{show_path(path)}: a folder; give the .ckpt or .safetensors file itself")
    if not path.is_file():
        raise BadFileError(f"{show_path(path)}: no such checkpoint; check the path")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        new = zipfile.is_zipfile(path)  # the old format of torch.save does not support memory mapping
        refuse_programs(path)
        data = torch.load(path, map_location="cpu", mmap=new, weights_only=False, pickle_module=_restricted())
    except BadFileError as error:
        raise BadFileError(f"{show_path(path)}: {error}") from error
    except Exception as error:  # torch and safetensors raise many error types for a damaged file
        raise BadFileError(
            f"{show_path(path)}: {path.stat().st_size} bytes that are no readable checkpoint; expected a complete "
            ".ckpt or .safetensors file: copy it again"
        ) from error
    state = data.get("state_dict", data) if isinstance(data, Mapping) else {}
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and isinstance(k, str)}
    if not tensors:
        raise BadFileError(f"{show_path(path)}: no tensors in it; expected a StableSR checkpoint")
    return tensors
