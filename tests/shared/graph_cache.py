"""A cache of exported graphs on disk, in front of `torch.onnx.export`."""

import hashlib
import io
import os
import pickle
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
NOT_EXPORTING = {"cli", "degradation", "demo.py", "evaluation", "faces", "runtime", "studio", "training"}
"""The packages and modules that exporting does not import; tests/test_layering.py checks it."""
EXPORTERS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")
"""The distributions whose versions change a graph."""
KEPT = 4
"""How many states of the sources keep their graphs."""


def sources():
    """Yield the files on which an exported graph depends."""
    for folder in (ROOT / "pfstorer_rt", ROOT / "export", ROOT / "kernels" / "ops"):
        for path in sorted(folder.rglob("*.py")):
            if not NOT_EXPORTING & set(path.relative_to(folder).parts):
                yield path
    yield ROOT / "constraints.txt"


def environment(files):
    """Return a hash of source files and of the versions of Python and `EXPORTERS`."""
    digest = hashlib.sha256(repr([sys.version, *((name, version(name)) for name in EXPORTERS)]).encode())
    for path in files:
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        digest.update(str(name).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Fingerprint(pickle.Pickler):
    """Pickles all that a module holds, so that equal modules give equal bytes in every process."""

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            kept = (str(value.dtype), tuple(value.shape), hashlib.sha256(data).digest())
            return tuple, (kept,)
        if isinstance(value, torch.nn.Module):
            state = {k: sorted(v) if isinstance(v, set) else v for k, v in vars(value).items()}
            return tuple, ((f"{type(value).__module__}.{type(value).__qualname__}", state),)
        return NotImplemented


def fingerprint(*values):
    """A hash of modules, tensors and plain values; raises an error of pickle for anything that it cannot read."""
    stream = io.BytesIO()
    Fingerprint(stream, protocol=5).dump(values)
    return hashlib.sha256(stream.getvalue()).hexdigest()[:24]


class GraphCache:
    """`export` with a cache of its graphs in a folder.

    files: the sources on which a graph depends; None selects `sources()`.
    """

    def __init__(self, folder, export, files=None):
        self.export, self.folder = export, folder / environment(files or sources())
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        for old in sorted(folder.iterdir(), key=os.path.getmtime)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def __call__(self, module, arguments, **options):
        """Return a program with its `model`: from the file where there is one, else from the exporter."""
        import onnx
        import onnx_ir

        try:
            file = self.folder / f"{fingerprint(module, arguments, repr(options))}.onnx"
        except (pickle.PicklingError, AttributeError, TypeError):  # a module that holds a local function
            return self.export(module, arguments, **options)
        with FileLock(file.with_suffix(".lock")):
            if file.exists():
                return SimpleNamespace(model=onnx_ir.from_proto(onnx.load(file)))
            program = self.export(module, arguments, **options)
            unfinished = file.with_suffix(".part")
            onnx.save(onnx_ir.to_proto(program.model), unfinished)
            unfinished.replace(file)
        return program
