"""Training in less memory has to be the same training."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.models.base import build_base
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.memory import frozen_weights_in, saving_memory
from pfstorer_rt.training.objectives import DreamBoothObjective, PersonalizationObjective

CPU = TrainConfig(device="cpu", precision="bf16")


@pytest.fixture
def base():
    return build_base("nano", seed=3)


def make_objective(base, method="pfstorer"):
    config = PersonalizeConfig()
    objective = DreamBoothObjective(base, config) if method == "dreambooth" else PersonalizationObjective(base, config)
    torch.manual_seed(0)
    for name, parameter in objective.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter, std=0.1)
    return objective


def make_batch(base):
    generator = torch.Generator().manual_seed(1)
    side, rows = base.config.latent_tile, {"hq": 2, "lq": 2, "noise": 2, "reference": 1}
    shape = (base.config.latent_channels, side, side)
    latents = {k: torch.randn(n, *shape, generator=generator) for k, n in rows.items()}
    return latents | {"t": torch.tensor([20, 700]), "self": torch.tensor(False)}


def step(objective, batch, autocast=True):
    """Loss, gradients by name, and the bytes that the forward pass kept for the backward one."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    objective.zero_grad(set_to_none=True)
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with precision, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = objective(batch)["loss"]
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}
    return loss.item(), gradients, sum(kept.values())


def assert_same(one, other, tolerance=0.0):
    assert one[0] == pytest.approx(other[0], rel=tolerance, abs=0)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], rtol=tolerance, atol=tolerance * gradient.abs().max()), name


@pytest.mark.parametrize("method", ["pfstorer", "dreambooth"])
def test_frozen_weights_in_half_precision_equal_autocast(base, method):
    objective, batch = make_objective(base, method), make_batch(base)
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    plain = step(objective, batch)
    with frozen_weights_in(objective, torch.bfloat16):
        held = step(objective, batch)
        halves = {n for n, p in objective.named_parameters() if p.dtype == torch.bfloat16}
        frozen = {n for n, p in objective.named_parameters() if not p.requires_grad and p.ndim >= 2}
        assert halves >= {n for n in frozen if "embedding" not in n}
        assert not any(p.requires_grad for n, p in objective.named_parameters() if n in halves)
    assert_same(plain, held, tolerance=1e-6)  # threads may sum in another order
    for name, parameter in objective.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name]), name


def test_frozen_weights_are_restored_after_a_failure(base):
    before = base.unet.conv_in.weight.clone()
    with pytest.raises(RuntimeError, match="stop"), frozen_weights_in(base.unet, torch.bfloat16):
        raise RuntimeError("stop")
    assert torch.equal(base.unet.conv_in.weight, before)


@pytest.mark.parametrize("method", ["pfstorer", "dreambooth"])
def test_recomputed_activations_give_the_same_gradients(base, method):
    objective, batch = make_objective(base, method), make_batch(base)
    kept = step(objective, batch, autocast=False)
    config = replace(CPU, precision="fp32", gradient_checkpointing=True)
    with accelerated(config) as accelerator, saving_memory(objective, config, accelerator):
        recomputed = step(objective, batch, autocast=False)
    assert_same(kept, recomputed, tolerance=1e-4)
    assert recomputed[2] < 0.7 * kept[2]
    after = step(objective, batch, autocast=False)
    assert after[2] > 0.95 * kept[2]  # and it is over with the training
