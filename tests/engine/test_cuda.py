"""The calls of `Cuda` to PyTorch and their order, without a GPU."""

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pfstorer_rt.engine.cuda import Cuda


class Stream:
    cuda_stream = 99

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")


@pytest.fixture
def traced(monkeypatch):
    """(a `Cuda` in host memory, the log of its calls)."""
    log, current = [], []

    @contextmanager
    def on(stream):
        current.append(stream)
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")
        current.pop()

    @contextmanager
    def graph(recorded, stream, capture_error_mode):
        log.append(f"captures on {stream.name}, {capture_error_mode}")
        yield
        recorded.replay = lambda: log.append(f"replays on {current[-1].name}")

    caller = Stream("caller", log)
    stand_ins = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "Stream": lambda device: Stream("engine", log),
        "stream": on,
        "current_stream": lambda device: caller,
        "graph": graph,
        "CUDAGraph": SimpleNamespace,
        "get_device_name": lambda device: "Fake GPU",
        "get_device_capability": lambda device: (8, 9),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    cuda = Cuda()
    assert cuda.device == torch.device("cuda", 0)
    cuda.device = torch.device("cpu")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: log.append("pinned") or self.clone())
    return cuda, log


def test_the_gpu_has_a_name_and_a_capability(traced):
    cuda, _ = traced
    assert (cuda.name(), cuda.compute_capability(), cuda.stream_handle()) == ("Fake GPU", (8, 9), 99)


def test_memory_is_allocated_on_the_engines_stream(traced):
    cuda, log = traced
    made = cuda.empty((2, 3), torch.half)
    assert made.shape == (2, 3) and made.dtype == torch.half and log == ["on engine", "off engine"]


def test_copies_are_ordered_with_the_callers_stream(traced):
    cuda, log = traced
    source, target = torch.arange(3.0), torch.zeros(3)
    cuda.copy(target, cuda.staged(source))
    assert torch.equal(target, source)
    assert log == ["pinned", "engine waits for caller", "on engine", "off engine"]
    log.clear()
    out = cuda.result(target)
    assert torch.equal(out, source) and out.data_ptr() != target.data_ptr()
    assert log == ["on engine", "off engine", "caller waits for engine", "kept for caller"]


def test_a_graph_is_captured_and_replayed_on_the_engines_stream(traced):
    cuda, log = traced
    replay = cuda.capture(lambda handle: log.append(f"enqueues on {handle}"))
    assert log == ["host waits for engine", "captures on engine, thread_local", "enqueues on 99"]
    log.clear()
    replay()
    assert log == ["on engine", "replays on engine", "off engine"]


def test_pytorch_has_every_used_name():
    assert {"stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    assert {"wait_stream", "synchronize"} <= set(dir(torch.cuda.Stream))
    assert hasattr(torch.cuda.CUDAGraph, "replay")
