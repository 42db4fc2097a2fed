"""GPU memory, streams and graphs for an engine, all through PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from pfstorer_rt.errors import MissingBackendError, one_line

Replay = Callable[[], None]
Result = TypeVar("Result")


class Cuda:
    """A GPU, by default the current one, and one stream on it."""

    def __init__(self, device: torch.device | None = None) -> None:
        if not torch.cuda.is_available():
            built = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no NVIDIA GPU"
            raise MissingBackendError(
                f"TensorRT needs an NVIDIA GPU: {built}; export for the target onnx to make a plan that runs here"
            )
        index = None if device is None else device.index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self.stream = torch.cuda.Stream(self.device)

    def name(self) -> str:
        """Return the GPU's name, such as `NVIDIA H200`."""
        return torch.cuda.get_device_name(self.device)

    def compute_capability(self) -> tuple[int, int]:
        """Return (major, minor)."""
        return torch.cuda.get_device_capability(self.device)

    def stream_handle(self) -> int:
        """Return the `cudaStream_t` of the stream as an integer."""
        return int(self.stream.cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialized device memory. The allocator reuses freed memory in the order of the stream."""
        with torch.cuda.stream(self.stream):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def staged(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor in pinned or device memory, from which an asynchronous copy is possible."""
        return tensor if tensor.is_cuda else tensor.pin_memory()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on the stream, after the pending work of the caller's stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        if source.is_cuda:
            source.record_stream(self.stream)

    def result(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy for the caller's stream; the next run of the engine overwrites `tensor`."""
        with torch.cuda.stream(self.stream):
            copied = tensor.clone()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        copied.record_stream(current)
        return copied

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self.stream.synchronize()

    def run(self, work: Callable[[], Result]) -> Result:
        """Call a function whose operations go to the stream."""
        with torch.cuda.stream(self.stream):
            return work()

    def capture(self, enqueue: Callable[[int], None]) -> Replay:
        """Capture `enqueue(stream handle)` as a CUDA graph; returns a function that replays the graph."""
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        # thread_local: other threads may call CUDA meanwhile, as TensorRT-RTX compiles kernels in the background.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            enqueue(self.stream_handle())

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                graph.replay()

        return replay


@dataclass(kw_only=True)
class Repeated:
    """State of work that runs often on the same memory: whether it has run, and its CUDA graph."""

    replay: Replay | None = None
    warm: bool = False


class Capturing:
    """Runs work on the stream of a `Cuda`: the first run is eager, the second is captured, later ones replay a graph.

    Libraries load and choose their kernels in an eager run, which a capture does not permit. `no_graph` is the reason
    why no work is captured, such as a failed capture; empty while graphs are used.
    """

    def __init__(self, cuda: Cuda, no_graph: str = "") -> None:
        self.cuda, self.no_graph = cuda, no_graph

    def run(self, work: Repeated, enqueue: Callable[[int], None]) -> None:
        """Run the work once; enqueue(stream handle) launches it."""
        if self.is_due(work):
            try:
                work.replay = self.cuda.capture(enqueue)
            except Exception as error:  # many exception types; a run without a graph is always possible
                self.no_graph = f"capturing failed ({one_line(error)})"
        if work.replay is not None:
            work.replay()
            return
        self.cuda.run(lambda: enqueue(self.cuda.stream_handle()))
        work.warm = True

    def is_due(self, work: Repeated) -> bool:
        """Whether the next run of the work is captured."""
        return work.warm and work.replay is None and not self.no_graph
