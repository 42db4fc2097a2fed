"""CUDA graphs of a PyTorch network: one launch in place of thousands, for every set of input shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pfstorer_rt.engine.cuda import Cuda, Replay
from pfstorer_rt.errors import one_line

Network = Callable[..., tuple[torch.Tensor, ...]]
MOST = 8
"""Largest number of kept graphs. Each has its own memory; the graph that was not used for the longest time goes."""


@dataclass
class Lane:
    """The memory of one set of input shapes, and its graph after the first run."""

    inputs: tuple[torch.Tensor, ...]
    outputs: list[torch.Tensor] = field(default_factory=list)
    replay: Replay | None = None
    warm: bool = False


class Graphed:
    """A network that runs on the stream of a `Cuda`, and replays a CUDA graph from the second run of a shape.

    The first run of a shape is eager: libraries load and choose their kernels in it, which a capture does not permit.
    If a capture fails, `no_graph` holds the reason, and every run is eager.
    """

    def __init__(self, network: Network, cuda: Cuda) -> None:
        self.network, self.cuda, self.no_graph = network, cuda, ""
        self._lanes: OrderedDict[tuple[object, ...], Lane] = OrderedDict()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the outputs, which the caller may keep; inputs may be on the host."""
        lane = self._lane(inputs)
        for buffer, tensor in zip(lane.inputs, inputs, strict=True):
            self.cuda.copy(buffer, self.cuda.staged(tensor.contiguous()))
        if lane.warm and lane.replay is None and not self.no_graph:
            self._capture(lane)
        if lane.replay is not None:
            lane.replay()
        else:
            lane.outputs = self.cuda.run(lambda: list(self.network(*lane.inputs)))
            lane.warm = True
        return tuple(self.cuda.result(tensor) for tensor in lane.outputs)

    def clear(self) -> None:
        """Free all graphs and their memory."""
        self._lanes.clear()

    def _lane(self, inputs: tuple[torch.Tensor, ...]) -> Lane:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if key not in self._lanes:
            while len(self._lanes) >= MOST:
                self._lanes.popitem(last=False)
            self._lanes[key] = Lane(tuple(self.cuda.empty(tuple(t.shape), t.dtype) for t in inputs))
        self._lanes.move_to_end(key)
        return self._lanes[key]

    def _capture(self, lane: Lane) -> None:
        def enqueue(_: int) -> None:
            lane.outputs = list(self.network(*lane.inputs))

        lane.outputs = []  # frees the memory of the eager run
        try:
            lane.replay = self.cuda.capture(enqueue)
        except Exception as error:  # many exception types; a run without a graph is always possible
            self.no_graph = f"capturing failed ({one_line(error)})"
