"""Too little memory for an image: smaller tiles first, then one line, then the next image."""

import numpy as np
import pytest
import torch
from PIL import Image

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.engine.session import Session, out_of_memory
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.runtime.batch import restore_files
from pfstorer_rt.runtime.layout import CodecTiles
from pfstorer_rt.runtime.memory import run_codec
from pfstorer_rt.runtime.restorer import Restorer

CONFIG = RestoreConfig(steps=1, color_fix="none")


class Small(Session):
    """A session on a device whose memory holds an image of `most` pixels."""

    def __init__(self, session, most, error):
        self.session, self.most, self.error, self.sides = session, most, error, []
        self.inputs, self.outputs, self.provider = session.inputs, session.outputs, session.provider

    def compute(self, **arrays):
        height, width = next(iter(arrays.values())).shape[-2:]
        self.sides.append((height, width))
        if height * width > self.most:
            raise self.error
        return self.session.run(**arrays)


CUDA = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ARENA = RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9437184")


def small(restorer, component, most, error=CUDA):
    """The restorer with one component on a small device."""
    sessions = dict(restorer.sessions)
    sessions[component] = Small(sessions[component], most, error)
    return Restorer(restorer.manifest, sessions, "torch"), sessions[component]


@pytest.mark.parametrize("error", [CUDA, ARENA, MemoryError()], ids=["cuda", "arena", "host"])
@pytest.mark.parametrize(("component", "pixels_per_value"), [("encoder", 1), ("decoder", 8)])
def test_encoder_and_decoder_continue_with_smaller_tiles(restorer, make_image, component, pixels_per_value, error):
    pixels, steps = make_image(256, 320), []
    engine, session = small(restorer, component, (160 // pixels_per_value) ** 2, error)
    found = engine.restore(pixels, CONFIG, lambda done, total: steps.append((done, total)))
    assert max(session.sides) > min(session.sides), "the first tile was too large"
    assert steps[-1][0] == steps[-1][1] and all(done <= total for done, total in steps)
    expected = restorer.restore(pixels, CONFIG)
    assert np.abs(found - expected).mean() < 0.01, "the margins of the smaller tiles are discarded"


def test_an_image_that_never_fits_is_one_failure_and_the_next_one_is_restored(restorer, make_image, tmp_path):
    for name, side in (("a", 128), ("b", 64)):
        Image.fromarray((make_image(side, side) * 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
    sessions = {name: Small(session, 64 * 64, CUDA) for name, session in restorer.sessions.items()}
    sessions["decoder"].most = 0
    engine = Restorer(restorer.manifest, sessions, "torch")
    outcomes = []

    def next_image(outcome):
        sessions["decoder"].most = 64 * 64
        outcomes.append(outcome)

    restore_files(engine, [tmp_path], tmp_path / "out", on_outcome=next_image)
    assert [outcome.status for outcome in outcomes] == ["failed", "done"]
    assert "too little memory for the smallest tile of encoder and decoder" in outcomes[0].report()["error"]


def test_too_little_memory_outside_the_networks_is_one_failure_too(restorer, make_image, tmp_path, monkeypatch):
    Image.fromarray((make_image(64, 64) * 255).astype(np.uint8)).save(tmp_path / "a.png")

    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(restorer, "passes", full)
    (failed,) = restore_files(restorer, [tmp_path / "a.png"])
    assert failed.report()["error"] == (
        "too little memory for this image; close other programs, or use a smaller scale"
    )


def test_other_errors_end_the_batch(restorer, make_image, tmp_path, monkeypatch):
    Image.fromarray((make_image(64, 64) * 255).astype(np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(restorer, "passes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        restore_files(restorer, [tmp_path / "a.png"])


def test_tiles_are_halved_down_to_a_smallest_size():
    sizes = []

    def fail(tiles):
        sizes.append((max(tiles.sides), tiles.margin))
        raise MemoryError

    with pytest.raises(PFStorerError, match="smallest tile"):
        run_codec(CodecTiles(100, 40, 64, 12), fail)
    assert sizes == [(64, 12), (32, 8), (16, 4), (8, 2), (4, 1)]
    with pytest.raises(ZeroDivisionError):
        run_codec(CodecTiles(100, 40, 64, 12), lambda tiles: 1 / 0)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA failure 2: out of memory ; GPU=0",
        "cudaErrorMemoryAllocation",
        "std::bad_alloc",
        "Exception from src/inference/src/dev/plugin.cpp:54: can't alloc",
        "Exception from src/inference/src/dev/plugin.cpp:54: Resource temporarily unavailable",
    ],
)
def test_memory_errors_of_engines_are_recognised(text):
    assert out_of_memory(RuntimeError(text)) and not out_of_memory(RuntimeError("an illegal memory access"))
