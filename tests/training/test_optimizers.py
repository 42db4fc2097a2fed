"""Muon trains matrices, AdamW everything else, and both obey the schedule and can be resumed."""

import sys

import pytest
import torch
from torch import nn

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.loop import Training, run_training
from pfstorer_rt.training.optimizers import MOMENTUM, MUON_RATE, make_optimizer, orthogonalized


class Identity(nn.Module):
    """Fits y = x with a matrix that is large enough for 8-bit optimizer state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)

    def forward(self, batch):
        return {"loss": (self.layer(batch["x"]) - batch["x"]).square().mean()}


def numbers(iteration, count=32):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(iteration))


def fit(folder, optimizer, stop=None):
    """Train; returns (parameters, state of the optimizer)."""
    config = TrainConfig(
        iterations=12, decay=0.5, device="cpu", precision="fp32", optimizer=optimizer, checkpoint_every=1
    )
    objective, file = Identity(), folder / "s.pt"
    groups = [{"params": list(objective.parameters()), "lr": 1e-2}]

    def batches(iteration, _number):
        if iteration == stop:
            raise SystemExit
        return {"x": numbers(iteration)}

    folder.mkdir(exist_ok=True)
    with accelerated(config) as accelerator:
        run_training(Training("t", objective, batches, config, file, "m", groups), accelerator)
    return list(objective.parameters()), torch.load(file, weights_only=True)["optimizer"]


def distance(one, other):
    return float(torch.cat([(a - b).flatten() for a, b in zip(one, other, strict=True)]).detach().norm())


def resumed(folder, optimizer):
    with pytest.raises(SystemExit):
        fit(folder, optimizer, stop=5)
    return fit(folder, optimizer)[0]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_the_8_bit_optimizers_train_like_adamw_and_can_be_resumed(tmp_path, optimizer):
    plain, _ = fit(tmp_path / "plain", "adamw")
    whole, state = fit(tmp_path / "whole", optimizer)
    parts = resumed(tmp_path / "parts", optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    start = list(Identity().parameters())
    assert distance(plain, whole) < 0.25 * distance(plain, start)
    assert state["state"][0]["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8


def test_an_8_bit_optimizer_without_its_package_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingBackendError, match=r"pip install 'pfstorer-rt\[gpu\]'"):
        make_optimizer(Identity().parameters(), TrainConfig(optimizer="adamw8bit"))


def test_a_resumed_training_with_muon_ends_with_the_same_weights(tmp_path):
    whole, state = fit(tmp_path / "whole", "muon")
    assert state["parts"][0]["param_groups"][0]["lr"] < 0.1 * MUON_RATE * 1e-2
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed(tmp_path / "parts", "muon"), strict=True))


def test_muon_changes_matrices_by_orthogonal_steps_and_all_others_as_adamw_does():
    module, reference = Identity(), Identity()
    module.row = nn.Parameter(torch.randn(1, 64))
    reference.row = nn.Parameter(module.row.detach().clone())
    settings = TrainConfig(optimizer="muon", learning_rate=1e-3, weight_decay=0.0)
    optimizer = make_optimizer(module.parameters(), settings)
    vectors = torch.optim.AdamW([reference.layer.bias, reference.row], lr=1e-3, weight_decay=0.0)
    momentum = torch.zeros(64, 64)
    for i in range(3):
        for net in (module, reference):
            net.zero_grad()
            (net({"x": numbers(i, 512)})["loss"] + (net.row - 1).square().sum()).backward()
        gradient, before = module.layer.weight.grad.clone(), module.layer.weight.detach().clone()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        optimizer.step()
        vectors.step()
        with torch.no_grad():
            reference.layer.weight.copy_(module.layer.weight)
        step = (before - module.layer.weight.detach()) / (MUON_RATE * 1e-3)
        u, _, v = torch.linalg.svd(MOMENTUM * momentum + (1 - MOMENTUM) * gradient)
        assert torch.linalg.svdvals(step).max() < 1.4  # Newton-Schulz leaves singular values of about 0.7 to 1.2
        assert float((step * (u @ v)).sum()) / 64 > 0.75  # 1 for the exact matrix u v
    assert torch.allclose(module.layer.bias, reference.layer.bias, atol=1e-7)
    assert torch.allclose(module.row, reference.row, atol=1e-7)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 24)])
def test_orthogonalized_is_near_the_polar_factor(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalized(matrix[None])[0]
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.25
    inner = u.T @ made @ v.T  # in the basis of the singular vectors
    assert torch.allclose(inner, inner.diag().diag(), atol=1e-4)


def test_muon_updates_as_pytorchs_does():
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("needs PyTorch 2.9")
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 600).reshape(20, 30).sin()) for _ in range(2))
    settings = TrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
    one = make_optimizer([mine], settings)
    other = muon([theirs], lr=1e-2 * MUON_RATE, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="original")
    for i in range(3):
        mine.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(i))
        theirs.grad = mine.grad.clone()
        one.step()
        other.step()
    assert torch.allclose(mine, theirs, atol=0.01)  # bf16 there


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_treats_a_convolution_as_the_matrix_of_its_output_channels(layout):
    weights = torch.linspace(-1, 1, 540).reshape(10, 6, 3, 3).sin()
    convolution, matrix = nn.Parameter(weights.clone(memory_format=layout)), nn.Parameter(weights.flatten(1).clone())
    settings = TrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
    optimizers = [make_optimizer([parameter], settings) for parameter in (convolution, matrix)]
    for i in range(3):
        matrix.grad = torch.randn(10, 54, generator=torch.Generator().manual_seed(i))
        convolution.grad = matrix.grad.reshape(10, 6, 3, 3).to(memory_format=layout)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(convolution.flatten(1), matrix)
    assert (matrix - weights.flatten(1)).norm() > 0.1
