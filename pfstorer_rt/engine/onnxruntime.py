"""The ONNX Runtime backend: runs on CUDA if the build and the machine support it, else on the CPU."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from pfstorer_rt.arrays import HostArray
from pfstorer_rt.engine.compiled import make_cache_folder, read_entry, write_entry
from pfstorer_rt.engine.session import Closed, Session, not_loaded
from pfstorer_rt.errors import MissingBackendError, one_line
from pfstorer_rt.files import sha256_bytes, work_folder
from pfstorer_rt.plan import Plan

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def check() -> None:
    """Raise `MissingBackendError` unless ONNX Runtime can be imported."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingBackendError("onnxruntime is not installed: pip install onnxruntime") from error


def providers(wanted: str | None = None) -> list[str]:
    """Return the execution providers for a session, fastest first.

    wanted: the provider to put first, by full or short name (`CPUExecutionProvider` or `cpu`). By default, CUDA is
    first if this build has it and it can run.
    Raises `MissingBackendError` for a provider that this build does not have or that cannot run.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if wanted is None:
        return [CUDA, CPU] if CUDA in available and cuda_refusal() is None else [CPU]
    names = {p.lower(): p for p in available} | {p.removesuffix("ExecutionProvider").lower(): p for p in available}
    if wanted.lower() not in names:
        hint = "; only the backend openvino takes a precision after a colon" if ":" in wanted else ""
        raise MissingBackendError(
            f"ONNX Runtime provider {wanted}: not in this build; it has {', '.join(available)}{hint}",
            setting="provider",
        )
    found = names[wanted.lower()]
    if found == CUDA and (reason := cuda_refusal()):
        raise MissingBackendError(f"ONNX Runtime provider {wanted}: {reason}; use cpu", setting="provider")
    return list(dict.fromkeys([found, CPU]))


@cache
def cuda_refusal() -> str | None:
    """Return why the CUDA provider of this build cannot run, or None if it can.

    ONNX Runtime itself would use the CPU without an error.
    """
    import onnxruntime

    try:
        with redirect_stdout(StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()  # finds CUDA and cuDNN in the packages that PyTorch and NVIDIA install
        load_provider(Path(onnxruntime.__file__).parent / "capi")
        return None if count_gpus() else "the NVIDIA driver sees no GPU"
    except OSError as error:
        return f"a library does not load ({one_line(error)})"


def load_provider(folder: Path) -> None:
    """Load the CUDA provider of ONNX Runtime; raises `OSError` with the name of a library that is missing."""
    name = "onnxruntime_providers_cuda.dll" if sys.platform == "win32" else "libonnxruntime_providers_cuda.so"
    ctypes.CDLL(str(folder / name))


def count_gpus() -> int:
    """Return the number of GPUs that the NVIDIA driver sees; raises `OSError` without a driver."""
    driver, count = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"), ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def on_gpu() -> bool:
    """Whether ONNX Runtime is installed with a CUDA provider that can run."""
    try:
        return providers()[0] == CUDA
    except ImportError:
        return False


@cache
def share_memory() -> None:
    """Make the memory arena of the CPU that all sessions of this process share."""
    import onnxruntime as ort

    arena, kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", arena, 0, kind), None)


class OnnxRuntimeSession(Session):
    """An ONNX Runtime session of one ONNX payload, or of a model file with external weights.

    The session uses the defaults of ONNX Runtime (all graph optimizations, a memory arena, one thread per core) with
    two changes. The threads stop spinning at the end of a run: by default they continue to spin and slow down the next
    session; on two cores an image took twice as long. All sessions share one arena, because their networks run one
    after the other. `benchmarks/engine_options.py` compares other settings.
    """

    def __init__(
        self,
        model: bytes | Path,
        provider: str | None = None,
        *,
        weights: Mapping[str, memoryview] | None = None,
        optimized: bool = False,
        save: Path | None = None,
    ) -> None:
        """Load a graph.

        weights: {file name: bytes} of its external data; ONNX Runtime copies the bytes. optimized: the graph was saved
        after its optimization, which is not repeated. save: file for the optimized graph.
        """
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)  # errors of a provider that does not load
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; the log of the C++ library would print them too
        options.add_session_config_entry("session.force_spinning_stop", "1")
        share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        if optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save:
            options.optimized_model_filepath = str(save)
        if weights:
            sizes = [len(data) for data in weights.values()]
            options.add_external_initializers_from_files_in_memory([*weights], [*weights.values()], sizes)
        wanted = providers(provider)
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=wanted)
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())
        self.provider: str = self._session.get_providers()[0]
        if provider and self.provider != wanted[0]:  # ONNX Runtime goes on with the next provider
            raise MissingBackendError(
                f"ONNX Runtime could not use {wanted[0]} and would run on {self.provider}; use the provider cpu",
                setting="provider",
            )

    def compute(self, **arrays: HostArray) -> dict[str, HostArray]:
        """Compute all outputs from all inputs, by name."""
        return dict(zip(self.outputs, self._session.run(None, arrays), strict=True))

    def close(self) -> None:
        """Free the engine."""
        self._session = Closed()


def optimized_graph(plan: Plan, component: str) -> Path | None:
    """Return the cache entry for the optimized graph of a component, or None if it has no entry.

    Only int8 graphs have entries: the optimization of other graphs takes no longer than reading an entry. The optimized
    graph depends on the version of ONNX Runtime and on the processor: the layout of convolution weights depends on the
    width of its vectors. The session options are always the same.
    """
    import onnxruntime

    payload = plan.manifest.payloads[component]
    folder = make_cache_folder("onnxruntime", plan) if payload.precision == "int8" and not payload.weights else None
    if not folder:
        return None
    vectors = np.show_config(mode="dicts").get("SIMD Extensions")
    made_for = (payload.sha256, onnxruntime.__version__, onnxruntime.get_build_info(), platform.machine(), vectors)
    return folder / f"{sha256_bytes(repr(made_for).encode())}.onnx"


def optimize(graph: bytes, provider: str | None, entry: Path) -> OnnxRuntimeSession:
    """Open a graph and write its optimized form into the cache; raises if one of them fails."""
    with work_folder(entry.parent) as folder:
        session = OnnxRuntimeSession(graph, provider, save=folder / entry.name)
        write_entry(entry, (folder / entry.name).read_bytes())
        return session


def open_component(plan: Plan, component: str, provider: str | None = None) -> OnnxRuntimeSession:
    """Open a component of an ONNX plan; raises `BadFileError` if ONNX Runtime cannot load it.

    On the CPU, the first opening of an int8 graph writes the optimized graph into the cache, and later ones read it. If
    the cache does not work, the graph is optimized again.
    """
    data = plan.read(component)
    entry = optimized_graph(plan, component) if providers(provider) == [CPU] else None
    if entry and (kept := read_entry(entry)):
        del data  # two graphs in memory would raise the peak
        with suppress(Exception):
            return OnnxRuntimeSession(kept, provider, optimized=True)
        data = plan.read(component)
    if entry:
        with suppress(Exception):  # ONNX Runtime has one exception type per status
            return optimize(data, provider, entry)
    try:
        with plan.map_weights(component) as weights:
            return OnnxRuntimeSession(data, provider, weights=weights)
    except MissingBackendError:
        raise
    except Exception as error:
        raise not_loaded(plan, component, "ONNX Runtime", error) from error
