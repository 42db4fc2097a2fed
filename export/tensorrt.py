"""TensorRT engines from the exported graphs, for `tensorrt` and `tensorrt_rtx`.

TensorRT-RTX builds without a GPU, for a set of compute capabilities, and completes the compilation on the target
machine. The full TensorRT times kernels during the build, so it builds on the machine that runs the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfstorer_rt.engine.tensorrt import Library, check_gpu, load_library
from pfstorer_rt.errors import MissingBackendError, PFStorerError
from pfstorer_rt.files import atomic_write, cache_home, make_folder

Phase = Callable[[str, int, int], None]
PORTABLE = ("8.0", "8.6", "8.9", "12.0+")
"""Default compute capabilities for TensorRT-RTX; `+` includes all later ones."""


@dataclass(frozen=True)
class BuildOptions:
    """Settings of the engine builder."""

    compute_capabilities: tuple[str, ...] = ()
    """GPUs to build for, such as `8.9`, or `current`; empty selects the library's default."""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    """Batch sizes of the denoiser: one optimization profile each."""
    largest_side: int = 1280
    """Largest side in pixels of images for encoder and decoder, equal to `TileConfig.chop`."""
    workspace: int | None = None
    """Largest scratch memory of a layer in bytes; None allows all memory of the GPU."""
    timing_cache: Path | None = None
    """File of kernel timings for the full TensorRT; None selects a file in the user's cache directory."""


@dataclass(frozen=True)
class BuiltEngine:
    """Facts about a built engine."""

    profiles: list[dict[str, list[list[int]]]]
    layers: dict[str, int]
    """Number of layers of the parsed network, by kind."""


class EngineBuilder:
    """Builds the engines of one plan.

    The constructor raises `MissingBackendError` when the library is missing, cannot build on this machine, or does not
    support a compute capability.
    """

    def __init__(self, target: str, options: BuildOptions, phase: Phase = lambda _, __, ___: None) -> None:
        self.library, self.options, self.phase = load_library(target), options, phase
        self._messages = self.library.logger()
        self.capabilities = self._capabilities()

    def build(
        self, component: str, origins: Mapping[str, str], model: Path, tile: int, scales: Mapping[str, int], file: Path
    ) -> BuiltEngine:
        """Build one component's engine from its saved ONNX graph and write it to `file`.

        origins: `Graph.origins`. tile: pixels. scales: `Component.scales`.
        Raises `PFStorerError` with the library's reason, the node and the node's original module.
        """
        trt = self.library.module
        builder = self._created(trt.Builder(self._messages))
        network = builder.create_network(self._network_flags())
        self._parse(network, model, origins)
        _allow_decomposition(self.library, network)
        config = builder.create_builder_config()
        profiles = self._add_profiles(builder, config, network, component, tile, scales)
        self._configure(config)
        cache = self._timing_cache(config)
        # TensorRT keeps a raw pointer to the monitor, which has to live as long as the build.
        monitor = _progress_monitor(trt, component, self.phase)
        config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise PFStorerError(
                f"{component}: {self.library.target} {self.library.version} could not build an engine "
                f"({self._messages.last() or 'no reason given'})"
            )
        with file.open("wb") as out:
            out.write(memoryview(serialized))
        if cache:
            with atomic_write(cache) as handle:
                handle.write(memoryview(config.get_timing_cache().serialize()))
        return BuiltEngine(profiles, dict(_layer_kinds(network)))

    def _capabilities(self) -> list[str]:
        wanted = self.options.compute_capabilities
        if self.library.target == "tensorrt-rtx" and not wanted:
            return list(PORTABLE)
        if self.library.target == "tensorrt-rtx" and "current" not in wanted:
            for name in wanted:
                _capability(self.library, name)
            return sorted(set(wanted), key=lambda name: tuple(map(int, name.split("."))))
        if self.library.target == "tensorrt-rtx" and set(wanted) != {"current"}:
            raise MissingBackendError(
                f"compute capability {', '.join(wanted)}: `current` is this machine's GPU alone; name it as X.Y "
                "to build for it and for others",
                setting="compute_capabilities",
            )
        if set(wanted) - {"current"}:
            raise MissingBackendError(
                f"compute capability {', '.join(sorted(set(wanted) - {'current'}))}: the full TensorRT times kernels "
                "on the GPU that it builds for; leave the compute capability out, or use the target tensorrt-rtx",
                setting="compute_capabilities",
            )
        return [_current_capability(self.library)]

    def _network_flags(self) -> int:
        flags = self.library.module.NetworkDefinitionCreationFlag
        # Versions without the flag support only strongly typed networks.
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def _parse(self, network: Any, model: Path, origins: Mapping[str, str]) -> None:
        parser = self.library.module.OnnxParser(network, self._messages)
        if parser.parse_from_file(str(model)):
            return
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        raise PFStorerError(
            f"{self.library.target} {self.library.version} cannot take the graph: "
            + "; ".join(_describe_error(problem, origins) for problem in problems)
        )

    def _add_profiles(
        self, builder: Any, config: Any, network: Any, component: str, tile: int, scales: Mapping[str, int]
    ) -> list[dict[str, list[list[int]]]]:
        inputs = {network.get_input(i).name: list(network.get_input(i).shape) for i in range(network.num_inputs)}
        profiles = plan_profiles(inputs, tile, scales, self.options)
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, (least, usual, most) in shapes.items():
                profile.set_shape(name, least, usual, most)
            if config.add_optimization_profile(profile) < 0:
                raise PFStorerError(f"{component}: {self.library.target} refused the profile {shapes}")
        return profiles

    def _configure(self, config: Any) -> None:
        trt = self.library.module
        wanted = self.options.compute_capabilities
        if self.library.target == "tensorrt-rtx" and wanted and self.library.has("ComputeCapability"):
            names = sorted(set(wanted))
            config.num_compute_capabilities = len(names)
            for i, name in enumerate(names):
                config.set_compute_capability(_capability(self.library, name), i)
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 stays fp32: TF32 rounds the factors of a product to 10 bits
        if self.library.has("BuilderFlag.REQUIRE_USER_ALLOCATION"):
            # A CUDA graph cannot capture memory that is allocated while an engine runs.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self.options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.options.workspace)

    def _timing_cache(self, config: Any) -> Path | None:
        """Load the timing cache of the full TensorRT; returns its file, None for TensorRT-RTX."""
        if self.library.target != "tensorrt":
            return None
        path = self.options.timing_cache or cache_home() / "tensorrt" / f"{self.library.version}.timing"
        make_folder(path.parent)
        config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
        return path

    def _created(self, builder: Any) -> Any:
        if builder is None or not hasattr(builder, "create_network"):
            raise MissingBackendError(
                f"{self.library.target} {self.library.version} cannot build on this machine "
                f"({self._messages.last() or 'no reason given'})"
            )
        return builder


def plan_profiles(
    inputs: Mapping[str, list[int]], tile: int, scales: Mapping[str, int], options: BuildOptions
) -> list[dict[str, list[list[int]]]]:
    """Return the optimization profiles, each {input: [smallest, usual, largest shape]}, for inputs with free axes.

    inputs: shapes with -1 where an axis is free. tile: pixels. scales: `Component.scales`. A component that takes any
    image size has one profile, for one image of a tile up to `largest_side`; the denoiser has one fixed shape for each
    batch size.
    """
    free = {name: shape for name, shape in inputs.items() if -1 in shape}
    if not scales:
        ladder = [{n: [b if d == -1 else d for d in s] for n, s in free.items()} for b in options.batches]
        return [{name: [shape] * 3 for name, shape in fixed.items()} for fixed in ladder]

    def sized(name: str, pixels: int) -> list[int]:
        side = pixels // scales[name]
        return [1, free[name][1], side, side]

    largest = max(options.largest_side, tile)
    return [{name: [sized(name, tile), sized(name, tile), sized(name, largest)] for name in free}]


def _allow_decomposition(library: Library, network: Any) -> None:
    """Allow matrix products for an attention without a fused kernel (fp32, or an unusual head size).

    A fused kernel is still preferred. Without this the whole build fails.
    """
    if not library.has("IAttentionInputLayer"):
        return
    trt = library.module
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # gives the bindings access to the properties of this layer type
            layer.attention.decomposable = True


def _layer_kinds(network: Any) -> Counter[str]:
    kinds = (str(network.get_layer(i).type).rpartition(".")[2].lower() for i in range(network.num_layers))
    return Counter(sorted(kinds))


def _capability(library: Library, name: str) -> Any:
    if name == "current":  # includes GPUs without a name in the library
        return library.module.ComputeCapability.CURRENT
    known = {m.removeprefix("SM") for m in dir(library.module.ComputeCapability) if m.startswith("SM")}
    digits = "".join(name.split("."))
    if name.count(".") != 1 or digits not in known:
        shown = (f"{number // 10}.{number % 10}" for number in sorted(map(int, known)))
        raise MissingBackendError(
            f"compute capability {name!r}: {library.target} {library.version} builds for {', '.join(shown)} or current",
            setting="compute_capabilities",
        )
    return getattr(library.module.ComputeCapability, f"SM{digits}")


def _current_capability(library: Library) -> str:
    import torch

    if not torch.cuda.is_available():
        raise MissingBackendError(
            f"{library.target} builds for the GPU of this machine, and torch sees none; the target tensorrt-rtx builds "
            "without a GPU if the compute capability is not `current`",
            setting="target",
        )
    capability = torch.cuda.get_device_capability()
    check_gpu(library.target, capability, torch.cuda.get_device_name())  # it would build an engine that it refuses
    return f"{capability[0]}.{capability[1]}"


def _describe_error(problem: Any, origins: Mapping[str, str]) -> str:
    name = problem.node_name()
    origin = origins.get(name)
    where = f"{problem.node_operator()} {name!r}" + (f" of {origin}" if origin else "")
    return f"{where}: {' '.join(problem.desc().split())}"


def _progress_monitor(trt: Any, component: str, phase: Phase) -> Any:
    """Return a monitor that calls `phase(name, done, total)` for the phases of a build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.totals[name] = steps
            phase(f"{component}: {name.lower()}", 0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            phase(f"{component}: {name.lower()}", step + 1, self.totals.get(name, step + 1))
            return True

        def phase_finish(self, name: str) -> None:
            self.totals.pop(name, None)

    return Monitor()
