import pytest
import torch

from pfstorer_rt.training.discriminator import FeatureDiscriminator, discriminator_loss, generator_loss


def maps(seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, side, side, generator=generator) for side in (16, 8, 4, 4, 2)]


def test_an_untrained_discriminator_outputs_zero():
    judged = FeatureDiscriminator([4] * 5, width=6)(maps(0))
    assert [tuple(j.shape) for j in judged] == [(2, 1, s, s) for s in (8, 4, 4, 4, 2)]
    assert all(not j.any() for j in judged)


def test_the_hinge_losses():
    real, made = [torch.tensor([[2.0, 0.5]])], [torch.tensor([[-3.0, 0.0]])]
    assert discriminator_loss(real, made).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1) / 2)
    assert generator_loss(made).item() == pytest.approx(1.5)
    assert generator_loss([*made, torch.full((1, 1, 9, 9), 0.5)]).item() == pytest.approx(0.5), "heads count alike"


def test_the_discriminator_learns_to_separate_two_kinds_of_features():
    torch.manual_seed(0)
    network = FeatureDiscriminator([4] * 5, width=8)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(60):
        real, made = network([m.abs() for m in maps(step)]), network([-m.abs() for m in maps(1000 + step)])
        loss = discriminator_loss(real, made)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
