"""The device of a training, and the state of the caller's process and base afterwards."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

import pfstorer_rt.device
from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.models.base import build_base
from pfstorer_rt.progress import ignore_progress
from pfstorer_rt.training.base import BaseTrainConfig, train_base
from pfstorer_rt.training.crops import CropConfig
from pfstorer_rt.training.device import accelerated, own_accelerate_state
from pfstorer_rt.training.personalize import personalize
from pfstorer_rt.training.wrapping import WrappingConfig, add_wrapping

CPU = TrainConfig(iterations=1, batch=1, device="cpu", precision="fp32")
SINGLETONS = (PartialState, AcceleratorState, GradientState)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_image):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        Image.fromarray((make_image(70, 66, seed=i) * 255).astype(np.uint8)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def learn(photos, base, folder: Path, method="pfstorer", on_progress=ignore_progress):
    config = PersonalizeConfig(method=method, train=CPU, pool=2)
    return personalize("alice", photos, base, config, folder / f"{method}.safetensors", on_progress=on_progress)


# ---- device and precision


def test_fp16_on_a_cpu_is_refused_with_advice():
    with (
        pytest.raises(MissingBackendError, match="bf16 or fp32"),
        accelerated(TrainConfig(precision="fp16", device="cpu")),
    ):
        pass


def test_a_missing_device_is_refused_with_advice(without_gpu):
    with pytest.raises(MissingBackendError, match="use device cpu"), accelerated(TrainConfig(device="cuda")):
        pass


def test_a_gpu_that_does_not_work_is_logged_and_the_cpu_trains(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pfstorer_rt.device, "find_fault", lambda device: "the GPU cannot be used (no kernel image)")
    with accelerated(TrainConfig(precision="fp32")) as accelerator:
        assert accelerator.device == torch.device("cpu")
    assert caplog.messages == ["the GPU cannot be used (no kernel image); training on the CPU"]
    with pytest.raises(MissingBackendError, match="no kernel image"), accelerated(TrainConfig(device="cuda")):
        pass


def test_precisions_can_change_within_one_process():
    for precision, expected in (("bf16", "bf16"), ("fp32", "no"), ("bf16", "bf16")):
        with accelerated(TrainConfig(precision=precision, device="cpu")) as accelerator:
            assert accelerator.mixed_precision == expected


def test_auto_uses_bf16_where_the_machine_has_it():
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    with accelerated(TrainConfig(precision="auto", device="cpu")) as accelerator:
        assert accelerator.mixed_precision == ("bf16" if native else "no")


# ---- the caller's process


def test_training_leaves_all_random_states_unchanged(photos, tmp_path):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    torch.manual_seed(11)
    before, base = states(), build_base("nano", seed=3)
    learn(photos, base, tmp_path)
    config = BaseTrainConfig("nano", CPU, CPU, CropConfig(holdout=0.0), crop=32)
    train_base(photos, tmp_path / "base", config, tmp_path / "work", base)
    assert states() == before


def test_training_does_not_depend_on_the_callers_random_state(photos, tmp_path):
    def weights(folder, state):
        torch.manual_seed(state)
        return learn(photos, build_base("nano", seed=3), folder).tensors

    first, second = weights(tmp_path, 1), weights(tmp_path, 2)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_callers_accelerator_stays_valid(photos, tmp_path):
    with own_accelerate_state():
        ours = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        environment = dict(os.environ)
        learn(photos, build_base("nano", seed=3), tmp_path)
        assert ours.mixed_precision == "bf16" and ours.gradient_accumulation_steps == 3 and ours.device.type == "cpu"
        assert dict(os.environ) == environment


def test_training_leaves_no_accelerate_state(photos, tmp_path):
    with own_accelerate_state():
        learn(photos, build_base("nano", seed=3), tmp_path)
        assert not any(singleton._shared_state for singleton in SINGLETONS)


# ---- the caller's base


def state_of(base):
    """Everything about a base that a training could leave changed, the weights aside."""
    modules = [m for network in base.modules().values() for m in network.modules()]
    kernels = [id(vars(m)[name]) for m in modules for name in ("kernels", "processor") if name in vars(m)]
    parameters = [p for m in modules for p in m.parameters(recurse=False)]
    layout = [(p.device, p.is_contiguous(), p.dtype, p.requires_grad, p.grad) for p in parameters]
    return base.device, kernels, [m.training for m in modules], layout


@pytest.mark.parametrize("method", ["pfstorer", "dreambooth"])
def test_personalizing_leaves_the_base_unchanged(photos, tmp_path, method):
    base = build_base("nano", seed=3)
    base.set_attention("reference")
    before = state_of(base)
    learn(photos, base, tmp_path, method)
    assert state_of(base) == before


def test_a_failed_training_leaves_the_base_unchanged(photos, tmp_path):
    base = build_base("nano", seed=3)
    before, rng = state_of(base), torch.get_rng_state()

    def fail(progress):
        if progress.stage == "personalize alice" and progress.done == progress.total:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        learn(photos, base, tmp_path, on_progress=fail)
    assert state_of(base) == before and torch.equal(torch.get_rng_state(), rng)


def test_a_trained_base_is_frozen_and_keeps_its_kernels(photos, tmp_path):
    base = build_base("nano", seed=3)
    base.set_attention("reference")
    attention = base.unet.kernels.attention
    config = WrappingConfig(CPU, CropConfig(holdout=0.0))
    add_wrapping(photos, base, tmp_path / "base", config, tmp_path / "work")
    _, _, training, layout = state_of(base)
    assert base.unet.kernels.attention is attention and not any(training)
    assert not any(requires_grad for _, _, _, requires_grad, _ in layout)
