"""The PyTorch engine: device, fp16, and CUDA graphs on a substitute for a GPU."""

import fake_tensorrt as fake
import numpy as np
import pytest
import torch

from pfstorer_rt import device as devices
from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.device import choose_device, choose_precision
from pfstorer_rt.engine import torch as engine
from pfstorer_rt.engine.graphs import MOST, Graphed
from pfstorer_rt.engine.torch import open_sessions
from pfstorer_rt.errors import MissingBackendError, SettingError
from pfstorer_rt.models.components import components
from pfstorer_rt.runtime.restorer import Restorer


@pytest.fixture
def gpu(monkeypatch):
    """Sessions that run on a substitute for a GPU: a function that opens them."""
    cuda = fake.FakeCuda()

    def open_on_gpu(base, identity=None):
        sessions = open_sessions(base, identity, precision="fp16")
        for session in sessions.values():
            session.run_graphs(cuda)
        return sessions, cuda

    return open_on_gpu


def test_the_second_run_of_a_shape_is_captured_and_later_runs_replay():
    cuda, calls = fake.FakeCuda(), []

    def network(x, y):
        calls.append(tuple(x.shape))
        return x + y, x * y

    graphed = Graphed(network, cuda)
    for n, (captures, replays) in enumerate([(0, 0), (1, 1), (1, 2)]):
        x, y = torch.full((2, 3), float(n)), torch.ones(2, 3)
        total, product = graphed(x, y)
        assert torch.equal(total, x + 1) and torch.equal(product, x)
        assert (cuda.captures, cuda.replays) == (captures, replays)
    kept = graphed(torch.zeros(2, 3), torch.ones(2, 3))[0]
    graphed(torch.full((2, 3), 7.0), torch.ones(2, 3))
    assert torch.equal(kept, torch.ones(2, 3))  # a later run does not overwrite a result
    graphed(torch.zeros(1, 3), torch.ones(1, 3))
    assert cuda.captures == 1  # the other shape has run once


def test_only_the_latest_shapes_keep_their_graphs():
    cuda = fake.FakeCuda()
    graphed = Graphed(lambda x: (x,), cuda)
    for side in range(1, MOST + 2):
        graphed(torch.zeros(side))
        graphed(torch.zeros(side))
    graphed(torch.zeros(MOST + 1))
    assert (cuda.captures, cuda.replays) == (MOST + 1, MOST + 2)
    graphed(torch.zeros(1))  # forgotten: it runs eagerly again
    assert (cuda.captures, cuda.replays) == (MOST + 1, MOST + 2)


def test_a_network_that_cannot_be_captured_runs_without_a_graph():
    graphed = Graphed(lambda x: (x + 1,), fake.FakeCuda(capturable=False))
    for n in range(3):
        assert graphed(torch.full((2,), float(n)))[0].tolist() == [n + 1] * 2
    assert graphed.no_graph == "capturing failed (operation not permitted when stream is capturing)"


@pytest.mark.parametrize("personal", [False, True])
def test_fp16_networks_with_graphs_restore_like_fp32(gpu, nano_base, nano_identity, make_image, personal):
    identity = nano_identity if personal else None
    pixels, config = make_image(96, 130), RestoreConfig(steps=2)
    with Restorer.from_base(nano_base, identity, device="cpu") as restorer:
        expected = restorer.restore(pixels, config)
        manifest = restorer.manifest
    sessions, cuda = gpu(nano_base, identity)
    with Restorer(manifest, sessions, "torch") as restorer:
        results = [restorer.restore(pixels, config) for _ in range(3)]
        assert restorer.recipe().batch == engine.GPU_TILES
    assert all(np.abs(result - expected).max() < 0.02 for result in results)
    assert cuda.captures and cuda.replays > cuda.captures
    assert nano_base.unet.conv_in.weight.dtype == torch.float32  # the caller's base is not changed


def test_fp16_sessions_fold_the_constants(nano_base, nano_identity):
    denoiser = open_sessions(nano_base, nano_identity, precision="fp16")["denoiser"]
    names = dict(denoiser.module.named_parameters())
    assert not any(name.endswith("attn2.to_k.weight") for name in names)
    convolution = names["module.denoiser.unet.conv_in.weight"]
    assert convolution.dtype == torch.float16 and convolution.is_contiguous(memory_format=torch.channels_last)


def test_a_decoder_that_overflows_in_fp16_computes_in_fp32(nano_base):
    base = nano_base.copy()
    base.vae = type(nano_base.vae).from_config(nano_base.vae.config)
    base.vae.load_state_dict({k: v.clone() for k, v in nano_base.vae.state_dict().items()})
    with torch.no_grad():
        first = next(m for m in base.vae.decoder.modules() if isinstance(m, torch.nn.Conv2d))
        first.weight *= 1e7
    inputs = components(base)["decoder"].example_inputs(1)
    half, full = (open_sessions(base, precision=p)["decoder"] for p in ("fp16", "fp32"))
    expected = full.compute(**inputs)["image"]
    for _ in range(2):
        assert torch.allclose(half.compute(**inputs)["image"], expected, rtol=1e-4)
    assert half.provider.endswith("fp32") and torch.isfinite(expected).all()


@pytest.mark.parametrize("name", ["evil", "mps", "cuda:x", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(SettingError, match="expected auto, cpu, cuda or cuda:N"):
        choose_device(name)


def test_a_gpu_that_does_not_work_is_not_used(monkeypatch):
    with pytest.raises(MissingBackendError, match="torch finds no CUDA device"):
        choose_device("cuda")
    assert choose_device().device.type == "cpu" and choose_device().refused is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fault = "the GPU cannot be used (CUDA error: no kernel image is available)"

    def fail(*_, device=None, **__):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(devices.torch, "ones", fail)
    choice = choose_device()
    assert (choice.device.type, choice.refused) == ("cpu", fault)
    with pytest.raises(MissingBackendError, match="cannot be used"):
        choose_device("cuda:0")


def test_the_note_of_the_device_reaches_the_caller(monkeypatch, nano_base):
    choice = devices.DeviceChoice(torch.device("cpu"), "the GPU cannot be used (driver too old)")
    monkeypatch.setattr(devices, "choose_device", lambda name: choice)
    with Restorer.from_base(nano_base) as restorer:
        assert restorer.note == "the GPU cannot be used (driver too old)"


def test_the_precision_follows_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_precision("auto", d) for d in (cpu, gpu)] == ["fp32", "fp32"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert [choose_precision(name, gpu) for name in ("auto", "fp32", "fp16")] == ["fp16", "fp32", "fp16"]
    with pytest.raises(SettingError, match="expected one of auto, fp32, fp16"):
        choose_precision("int4", cpu)


def test_compiled_networks_are_kept_in_the_cache_folder(monkeypatch, nano_base, tmp_path):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    monkeypatch.setattr(engine, "cache_home", lambda: tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    open_sessions(nano_base, compiled=True)
    assert compiled == [{"dynamic": False}] * 3
    assert engine.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
