"""CUDA graphs of a PyTorch network: one launch in place of thousands, for every set of input shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pfstorer_rt.engine.cuda import Capturing, Cuda, Repeated

Network = Callable[..., tuple[torch.Tensor, ...]]
MOST = 8
"""Largest number of kept graphs. Each has its own memory; the graph that was not used for the longest time goes."""


@dataclass
class Lane(Repeated):
    """The memory of one set of input shapes, and its graph after the first run."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...] = ()


class Graphed:
    """A network that replays a CUDA graph from the second run of a shape (`engine.cuda.Capturing`)."""

    def __init__(self, network: Network, cuda: Cuda) -> None:
        self.network, self.cuda, self.capturing = network, cuda, Capturing(cuda)
        self._lanes: OrderedDict[tuple[object, ...], Lane] = OrderedDict()

    @property
    def no_graph(self) -> str:
        """Why no graph is used; empty while graphs are used."""
        return self.capturing.no_graph

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the outputs, which the caller may keep; inputs may be on the host."""
        lane = self._lane(inputs)
        for buffer, tensor in zip(lane.inputs, inputs, strict=True):
            self.cuda.copy(buffer, self.cuda.staged(tensor.contiguous()))

        def enqueue(_: int) -> None:
            lane.outputs = ()  # frees the memory of the run before
            lane.outputs = self.network(*lane.inputs)

        self.capturing.run(lane, enqueue)
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
