"""The TensorRT and TensorRT-RTX backends: both libraries of NVIDIA have nearly the same Python interface."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pfstorer_rt.engine.cuda import Capturing, Cuda, Repeated
from pfstorer_rt.engine.session import Closed, TensorSession
from pfstorer_rt.errors import BadFileError, MismatchError, MissingBackendError, PFStorerError, SettingError
from pfstorer_rt.extras import install
from pfstorer_rt.files import atomic_write, cache_home, make_folder, sha256_bytes, show_path
from pfstorer_rt.plan import Plan

TARGETS = ("tensorrt", "tensorrt-rtx")
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Target -> Python module of its library."""
EXTRAS = {target: install(target) for target in TARGETS}
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9))
RTX_LATER = (12, 0)
"""TensorRT-RTX runs on these compute capabilities, and on `RTX_LATER` and later ones."""
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX. Features are detected by name, not by version."""

    target: str
    module: Any

    @property
    def version(self) -> str:
        """Return the release, such as `1.7.1.116`."""
        return str(self.module.__version__)

    def has(self, path: str) -> bool:
        """Whether this release has an attribute, such as `IRuntimeConfig.create_runtime_cache`."""
        found = self.module
        for name in path.split("."):
            found = getattr(found, name, None)
        return found is not None

    def logger(self) -> Any:
        """Return the only logger of the library, emptied. It stores errors instead of printing them.

        `last()` returns the latest error, or an empty string.
        """
        messages = _messages(self.module)
        messages.errors.clear()
        return messages


@cache
def _messages(trt: Any) -> Any:
    """Make the logger of a library. The library uses its first logger forever, so the logger must stay alive."""

    class Messages(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def last(self) -> str:
            # The second of two errors is often a consequence of the first.
            return "; ".join(self.errors[-2:])[:400]

    return Messages()


def load_library(target: str) -> Library:
    """Import the library of a target; raises `MissingBackendError` if it is not installed."""
    try:
        return Library(target, import_module(MODULES[target]))
    except (ImportError, OSError) as error:  # OSError: installed, but its shared libraries do not load
        raise MissingBackendError(f"{target} is not installed or does not load ({error}): {EXTRAS[target]}") from error


def check() -> None:
    """Raise `MissingBackendError` unless a GPU and at least one library that runs on it are available."""
    usable_target()


def usable_target() -> str:
    """Return the target of the first library that runs on the GPU of this machine, TensorRT-RTX before TensorRT.

    Raises `MissingBackendError` with the reasons when there is none.
    """
    cuda, reasons = Cuda(), []
    for target in reversed(TARGETS):
        try:
            load_library(target)
            check_gpu(target, cuda.compute_capability(), cuda.name())
            return target
        except MissingBackendError as error:
            reasons.append(str(error))
    raise MissingBackendError("; ".join(reasons))


def check_gpu(target: str, capability: tuple[int, int], name: str) -> None:
    """Raise `MissingBackendError` if the library of a target does not run on a GPU.

    TensorRT-RTX refuses the data-centre GPUs of Hopper and Blackwell (compute capabilities 9.0 to 11.0), even for
    engines that it built for them.
    """
    if target == "tensorrt-rtx" and not (capability in RTX_CAPABILITIES or capability >= RTX_LATER):
        raise MissingBackendError(
            f"TensorRT-RTX does not run on the {name} (compute capability {capability[0]}.{capability[1]}); use the "
            "target tensorrt, or a base in PyTorch"
        )


def open_component(plan: Plan, component: str, provider: str | None = None) -> TensorRTSession:
    """Open a component of a TensorRT plan on the current GPU.

    All checks precede the execution of the payload. Raises `ValueError` if a provider is given, `BadFileError` for an
    untrusted plan or a damaged payload, `MissingBackendError` without library or GPU, `MismatchError` for a plan of
    another GPU or release.
    """
    if provider:
        raise SettingError(f"provider {provider}: TensorRT has none to choose from; leave it out", setting="provider")
    plan.check_trusted()
    library, cuda = load_library(plan.manifest.target), Cuda()
    check_gpu(plan.manifest.target, cuda.compute_capability(), cuda.name())
    check_fits(plan, library, cuda)
    payload = plan.read(component)
    try:
        return TensorRTSession(library, payload, cuda, graphs=component == "denoiser")
    except BadFileError as error:
        message = f"{show_path(plan.path)}: the {component} {error}; export the plan again"
        raise BadFileError(message, rebuild=plan.rebuild()) from error


def check_fits(plan: Plan, library: Library, cuda: Cuda) -> None:
    """Raise `MismatchError` if the plan was built for another GPU or with another major release of the library."""
    title = TITLES[library.target]
    built_by = plan.manifest.tools.get(library.target, "an unknown release")
    if built_by.split(".")[0] != library.version.split(".")[0]:
        raise MismatchError(
            f"{show_path(plan.path)} was built by {title} {built_by}, this machine has {library.version}; "
            "export the plan again",
            rebuild=plan.rebuild(),
        )
    wanted, mine = plan.manifest.compute_capabilities, cuda.compute_capability()
    if not any(_covers(name, mine) for name in wanted):
        raise MismatchError(
            f"{show_path(plan.path)} was built for compute capability {', '.join(wanted) or 'none'}, the "
            f"{cuda.name()} here has {mine[0]}.{mine[1]}; export the plan again",
            rebuild=plan.rebuild(current=True),
        )


def _covers(name: str, capability: tuple[int, int]) -> bool:
    major, _, minor = name.removesuffix("+").partition(".")
    built = (int(major), int(minor))
    return built <= capability if name.endswith("+") else built == capability


@dataclass
class Lane(Repeated):
    """One optimization profile: an execution context, its buffers, and for fixed shapes the captured CUDA graph."""

    context: Any
    profile: int
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class TensorRTSession(TensorSession):
    """One engine on one GPU.

    An engine with several profiles, one batch size each, accepts any number of rows. The rows run in the smallest
    profile that holds them, padded with copies of the last row. More rows than the largest batch run in chunks. Inputs
    whose first axis is fixed (`strength`) are passed to every chunk unchanged.
    graphs: replay each profile as a CUDA graph after its first run; the shapes of each profile must be fixed. If
    capture fails, `no_graph` holds the reason and the engine runs without graphs.
    """

    def __init__(self, library: Library, payload: bytes, cuda: Cuda, graphs: bool = False) -> None:
        """Raise `BadFileError` if the library rejects the payload."""
        self.library, self.cuda, self.device = library, cuda, cuda.device
        self.provider = f"{TITLES[library.target]} {library.version} on {cuda.name()}"
        self.capturing = Capturing(cuda, "" if graphs else "its shapes vary")
        self._messages = library.logger()
        self._runtime = library.module.Runtime(self._messages)
        self._engine = self._deserialize(payload)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = library.module.TensorIOMode.INPUT
        self.inputs = tuple(n for n in names if self._engine.get_tensor_mode(n) == is_input)
        self.outputs = tuple(n for n in names if n not in self.inputs)
        self._types = {n: _torch_type(library, self._engine.get_tensor_dtype(n)) for n in names}
        self._batched = tuple(n for n in self.inputs if tuple(self._engine.get_tensor_shape(n))[:1] == (-1,))
        self._lanes: dict[int, Lane] = {}
        self._config = self._runtime_config(graphs)
        self._cache = RuntimeCache(library, self._config, sha256_bytes(payload), cuda.name())

    @property
    def no_graph(self) -> str:
        """Why no CUDA graph is used; empty while graphs are used."""
        return self.capturing.no_graph

    def compute(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute all outputs from all inputs, by name, on tensors of `device`, without synchronizing with the host.

        Host tensors are copied through pinned memory. Raises `ValueError` for unknown names or different numbers of
        rows, `PFStorerError` for a shape outside all profiles.
        """
        if set(tensors) != set(self.inputs):
            raise ValueError(f"inputs {', '.join(tensors)}: this engine takes {', '.join(self.inputs)}")
        if not self._batched:
            return self._run_profile(0, tensors)
        rows, done, parts = self._rows(tensors), 0, []
        while done < rows:
            profile, batch = self._choose_profile(rows - done)
            count = min(batch, rows - done)
            chosen = {
                name: _fill(tensor[done : done + count], batch) if name in self._batched else tensor
                for name, tensor in tensors.items()
            }
            parts.append({name: out[:count] for name, out in self._run_profile(profile, chosen).items()})
            done += count
        return parts[0] if len(parts) == 1 else {n: torch.cat([part[n] for part in parts]) for n in self.outputs}

    def close(self) -> None:
        """Free the engine."""
        try:
            self.cuda.synchronize()
            self._cache.save()
        finally:
            self._lanes.clear()
            self._cache.release()
            self._config = self._engine = self._runtime = Closed()

    def _deserialize(self, payload: bytes) -> Any:
        if self.library.has("Runtime.get_engine_validity"):
            validity, why = self._runtime.get_engine_validity(payload[: self._runtime.engine_header_size])
            if validity == self.library.module.EngineValidity.INVALID:
                reason = _diagnostics(self.library, why) or self._messages.last() or "no reason given"
                raise BadFileError(f"is no engine for this machine ({reason})")
        engine = self._runtime.deserialize_cuda_engine(payload)
        if engine is None:
            reason = self._messages.last() or "no reason given"
            raise BadFileError(f"cannot be loaded by {TITLES[self.library.target]} ({reason})")
        return engine

    def _runtime_config(self, graphs: bool) -> Any:
        """Return the runtime configuration of the contexts, or None for a release without one."""
        if not self.library.has("ICudaEngine.create_runtime_config"):
            return None
        config = self._engine.create_runtime_config()
        if graphs and self.library.has("DynamicShapesKernelSpecializationStrategy.EAGER"):
            # By default the library compiles kernels for a shape in the background and replaces general kernels later.
            # A graph that was captured earlier would continue to use the general kernels.
            eager = self.library.module.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        return config

    def _rows(self, tensors: dict[str, torch.Tensor]) -> int:
        """Return the number of rows, which must be the same for all batched inputs."""
        counts = {name: len(tensors[name]) for name in self._batched}
        rows = counts[self._batched[0]]
        if rows == 0 or set(counts.values()) != {rows}:
            raise ValueError(f"rows of the inputs {counts}: expected one or more, and the same number in each")
        return rows

    def _range(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the smallest and largest shape of an input in a profile."""
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(most)

    def _choose_profile(self, rows: int) -> tuple[int, int]:
        """Return (profile, batch size) of the smallest profile that holds the rows, or of the largest profile."""
        name = self._batched[0]
        batches = [(self._range(name, i)[1][0], i) for i in range(self._engine.num_optimization_profiles)]
        fitting = [entry for entry in batches if entry[0] >= rows] or [max(batches)]
        batch, profile = min(fitting)
        return profile, batch

    def _lane(self, profile: int) -> Lane:
        if profile not in self._lanes:
            config = () if self._config is None else (self._config,)
            context = self._engine.create_execution_context(*config)
            if context is None:
                raise PFStorerError(
                    f"{self.provider}: no memory or no kernels for a context ({self._messages.last()}); "
                    "use a smaller batch of tiles, or the backend torch"
                )
            context.set_optimization_profile_async(profile, self.cuda.stream_handle())
            self._lanes[profile] = Lane(context, profile)
        return self._lanes[profile]

    def _run_profile(self, profile: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        lane = self._lane(profile)
        self._bind(lane, {name: tuple(tensors[name].shape) for name in self.inputs})
        for name in self.inputs:
            self.cuda.copy(lane.buffers[name], self.cuda.staged(tensors[name].to(self._types[name]).contiguous()))
        self._enqueue(lane)
        return {name: self.cuda.result(lane.buffers[name]) for name in self.outputs}

    def _bind(self, lane: Lane, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the shapes and buffers of the context; buffers are allocated only for new shapes."""
        if shapes == lane.shapes:
            return
        for name, shape in shapes.items():
            self._check_shape(name, shape, lane.profile)
        lane.shapes, lane.replay, lane.warm = {}, None, False  # until all is bound
        lane.buffers.clear()
        for name, shape in shapes.items():
            lane.context.set_input_shape(name, shape)
        for name in (*self.inputs, *self.outputs):
            shape = shapes.get(name) or tuple(lane.context.get_tensor_shape(name))
            lane.buffers[name] = self.cuda.empty(shape, self._types[name])
            lane.context.set_tensor_address(name, lane.buffers[name].data_ptr())
        lane.shapes = shapes

    def _check_shape(self, name: str, shape: tuple[int, ...], profile: int) -> None:
        fixed = tuple(self._engine.get_tensor_shape(name))
        least, most = self._range(name, profile) if -1 in fixed else (fixed, fixed)
        if len(shape) != len(least) or any(not a <= s <= b for a, s, b in zip(least, shape, most, strict=True)):
            raise PFStorerError(
                f"{name} of shape {list(shape)}: this engine takes {list(least)} to {list(most)}; restore in smaller "
                "squares (TileConfig.chop), or export a plan with a larger BuildOptions.largest_side"
            )

    def _enqueue(self, lane: Lane) -> None:
        """Run a lane: the first run compiles and loads kernels, the second is captured, later runs replay the graph."""
        if self.capturing.is_due(lane) and not self._is_capturable(lane):
            self.capturing.no_graph = "the library cannot be captured here"
        self.capturing.run(lane, partial(self._execute, lane))

    def _execute(self, lane: Lane, stream: int) -> None:
        if not lane.context.execute_async_v3(stream):
            raise PFStorerError(f"{self.provider} failed ({self._messages.last() or 'no reason given'})")

    def _is_capturable(self, lane: Lane) -> bool:
        known = self.library.has("IExecutionContext.is_stream_capturable")
        return not known or bool(lane.context.is_stream_capturable(self.cuda.stream_handle()))


class RuntimeCache:
    """Cache of the kernels that TensorRT-RTX compiles at run time, in the user's cache directory.

    Errors of the cache do not stop a restoration: a cache that is damaged or not writable is ignored. TensorRT itself
    compiles nothing at run time and has no cache.
    """

    def __init__(self, library: Library, config: Any, digest: str, device_name: str) -> None:
        self._cache: Any = None
        self._before = b""
        words = [digest[:32], library.version, "".join(c if c.isalnum() else "-" for c in device_name)]
        self.path: Path = cache_home() / library.target / ("_".join(words) + ".cache")
        if config is None or not library.has("IRuntimeConfig.create_runtime_cache"):
            return
        with contextlib.suppress(Exception):
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(Exception):
                self._before = self.path.read_bytes()
                self._cache.deserialize(self._before)
            config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Save the compiled kernels, readable by their owner only, because they belong to a person's plan."""
        if self._cache is None:
            return
        with contextlib.suppress(Exception):
            data = bytes(memoryview(self._cache.serialize()))
            if data != self._before:
                make_folder(self.path.parent)
                with atomic_write(self.path, mode=0o600) as file:
                    file.write(data)

    def release(self) -> None:
        """Release the cache object of the library."""
        self._cache = None


def _fill(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat the last row to fill the batch."""
    missing = batch - len(rows)
    return rows if missing == 0 else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def _torch_type(library: Library, kind: Any) -> torch.dtype:
    types = library.module.DataType
    known = {types.FLOAT: torch.float32, types.HALF: torch.float16, types.BF16: torch.bfloat16}
    known |= {types.INT32: torch.int32, types.INT64: torch.int64, types.BOOL: torch.bool}
    return known[kind]


def _diagnostics(library: Library, bits: int) -> str:
    """Return the names in a mask of `EngineInvalidityDiagnostics`, as returned by `get_engine_validity`."""
    reasons = getattr(library.module, "EngineInvalidityDiagnostics", None)
    members: dict[str, Any] = getattr(reasons, "__members__", {})
    named = [name.lower().replace("_", " ") for name, value in members.items() if bits & int(value)]
    return ", ".join(named)
