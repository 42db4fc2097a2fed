"""A cache of traced graphs on disk, by the architecture of their modules.

Tracing a denoiser takes half a minute, and everything else in an export a few seconds. The files contain no weights and
nothing of a person.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pfstorer_rt import files, models
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.files import atomic_write, make_folder, open_plain
from pfstorer_rt.onnx_message import read_graph

EXPORTERS = ("torch", "diffusers", "onnx", "onnx-ir", "onnxscript")
"""The distributions whose versions change a graph."""
KEPT = 256
"""Number of graphs in the folder; the least recently used ones are removed. A graph has 0.01 to 2 MB."""
_LARGEST = 1 << 26
_DIGEST = hashlib.sha256().digest_size


def graph_key(module: nn.Module, free: Mapping[str, tuple[int | None, ...]], *options: Any) -> str | None:
    """Return the key of the graph of a module: a hash of all that its trace depends on.

    That is the structure of the module, shapes and types of its parameters and buffers, the versions of the exporter
    and the sources of the networks, but no values. free: the shapes of tensors with free axes, by path, with None for
    a free axis. options: further values.
    Returns None for a module that has no key, because it holds a local function or refers to itself.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    known = {id(tensor): (name, free.get(name, tuple(tensor.shape))) for name, tensor in tensors.items()}
    stream = io.BytesIO()
    try:
        _Structure(stream, known).dump((environment(), module, options))
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError):
        return None
    return hashlib.sha256(stream.getvalue()).hexdigest()


def load_graph(key: str) -> bytes | None:
    """Return a traced graph; None if there is none, or if its file is damaged or refers to other files."""
    path = files.graph_folder() / key
    try:
        with open_plain(path) as file:
            data = file.read(_LARGEST)
        digest, model = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(model).digest() != digest:
            return None
        facts = read_graph(model)
        path.touch()
    except (OSError, ValueError, PFStorerError):
        return None
    return None if facts.others or any(tensor.external for tensor in facts.tensors) else model


def save_graph(key: str, model: bytes) -> None:
    """Write a traced graph, readable by its owner only; a folder that cannot be written is no error."""
    with contextlib.suppress(OSError, PFStorerError):
        folder = make_folder(files.graph_folder())
        with atomic_write(folder / key, mode=0o600) as file:
            file.write(hashlib.sha256(model).digest() + model)
        kept = sorted(filter(Path.is_file, folder.iterdir()), key=lambda path: path.stat().st_mtime)
        for old in kept[:-KEPT]:
            old.unlink()


@cache
def environment() -> str:
    """Return a hash of the sources of the networks and of the versions of Python and `EXPORTERS`."""
    versions = [sys.version, *((name, version(name)) for name in ("pfstorer-rt", *EXPORTERS))]
    digest = hashlib.sha256(repr(versions).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def sources() -> Iterator[Path]:
    """Yield the files on which a traced graph depends besides the structure of its module."""
    networks = Path(models.__file__).parent
    yield from sorted(networks.rglob("*.py"))
    yield networks.with_name("ops.py")
    yield from (Path(__file__).with_name(name) for name in ("compose.py", "trace.py"))


class _Structure(pickle.Pickler):
    """Writes the structure of a module, which is never read: equal structures give equal bytes in every process."""

    def __init__(self, stream: io.BytesIO, known: Mapping[int, tuple[str, tuple[int | None, ...]]]) -> None:
        """known: names and shapes of parameters and buffers by `id`; of other tensors the values count."""
        super().__init__(stream, protocol=5)
        self.known = known
        self.fast = True  # without references to earlier objects: equal values may be one object or two

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().numpy().tobytes() if id(value) not in self.known else b""
            return tuple, ((str(value.dtype), self.known.get(id(value), ("", tuple(value.shape))), data),)
        if isinstance(value, nn.Module):
            return tuple, ((f"{type(value).__module__}.{type(value).__qualname__}", _state(value)),)
        return NotImplemented


def _state(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module in a form that is equal in every process."""

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, set):
            return sorted(value)
        if name == "_internal_dict":  # diffusers adds paths, and lists without an order, under private names
            return {key: setting for key, setting in value.items() if not key.startswith("_")}
        return list(value.values()) if name.endswith("_hooks") else value  # their keys count all hooks of the process

    return {name: plain(name, value) for name, value in vars(module).items()}
