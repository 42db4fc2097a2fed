"""Iterations of a training as CUDA graphs: one launch in place of thousands.

Restrictions: the objective must not wait for the device, and batches must have few different sets of shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pfstorer_rt.training.data import Batch
from pfstorer_rt.training.losses import Losses

WARM_UP = 3
"""Iterations without a graph for each set of shapes, in which libraries choose their algorithms."""
Run = Callable[[], Losses]


class Recorder(Protocol):
    """Records the operations of an iteration."""

    def prepare(self, optimizer: Any, device: torch.device) -> None:
        """Change the optimizer so that its steps can be recorded."""

    def warm_up(self, run: Run) -> Losses:
        """Do an iteration without recording it."""

    def record(self, run: Run) -> Run:
        """Record an iteration without doing it; returns a function that does it with the same memory."""


class CudaGraphs:
    """Records iterations as CUDA graphs that share their memory, since only one runs at a time."""

    def prepare(self, optimizer: Any, device: torch.device) -> None:
        """Keep the rates and counters of AdamW on the device, where a graph reads them."""
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group["capturable"] = True
        for state in optimizer.state.values():
            state["step"] = state["step"].to(device)

    def warm_up(self, run: Run) -> Losses:
        """Do an iteration on the stream of the graphs."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            losses = run()
        current.wait_stream(self.stream)
        return losses

    def record(self, run: Run) -> Run:
        """Capture an iteration; the returned function writes to the same tensors at every call."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            losses = run()

        def replay() -> Losses:
            graph.replay()
            return losses

        return replay


@dataclass
class Recording:
    """The inputs of one set of shapes, and the recorded iteration after the first iterations."""

    inputs: Batch
    runs: int = 0
    replay: Run | None = None


class RecordedStep:
    """Does the iterations of a training, recorded from the fourth iteration of each set of shapes on."""

    def __init__(self, run: Callable[[Batch], Losses], recorder: Recorder) -> None:
        self.run, self.recorder = run, recorder
        self._recordings: dict[tuple[Any, ...], Recording] = {}

    def __call__(self, batch: Batch) -> Losses:
        """Do an iteration; the losses are valid until the next one."""
        key = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items())
        if key not in self._recordings:
            self._recordings[key] = Recording({name: torch.empty_like(tensor) for name, tensor in batch.items()})
        recording = self._recordings[key]
        for name, tensor in batch.items():
            recording.inputs[name].copy_(tensor)
        recording.runs += 1
        if recording.runs <= WARM_UP:
            return self.recorder.warm_up(lambda: self.run(recording.inputs))
        if recording.replay is None:
            recording.replay = self.recorder.record(lambda: self.run(recording.inputs))
        return recording.replay()
