"""The objective of an identity on a nano base."""

import pytest
import torch
from torch import nn

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.models.base import build_base
from pfstorer_rt.training import objectives
from pfstorer_rt.training.objectives import PersonalizationObjective
from pfstorer_rt.training.pool import BatchMaker, LatentPool

PHOTOS = 3


@pytest.fixture
def base():
    return build_base("nano", seed=3)


def batches(base, config, count):
    side = base.config.latent_tile
    hq, lq, references = torch.randn(3, 6, base.config.latent_channels, side, side).unbind(0)
    pool = LatentPool(hq, lq, torch.arange(6) % PHOTOS, references[:PHOTOS])
    maker = BatchMaker(pool, config)
    return [maker(number, number) for number in range(count)]


def gradients(base, config, batches):
    """The gradients of the blocks of each batch, and the objective."""
    torch.manual_seed(0)
    objective = PersonalizationObjective(base, config)
    for block in objective.blocks:
        nn.init.normal_(block.gamma, std=0.1)
    found = []
    for batch in batches:
        objective.zero_grad()
        objective(batch)["loss"].backward()
        found.append([p.grad.clone() for p in objective.blocks.parameters() if p.grad is not None])
    return found, objective


@pytest.mark.parametrize("references", [1, 2])
def test_a_token_that_is_not_trained_gives_the_same_gradients_and_one_pass_per_photo(base, monkeypatch, references):
    trained = PersonalizeConfig(references=references, p_self=0.0)
    frozen = PersonalizeConfig(references=references, p_self=0.0, token_learning_rate=0.0)
    torch.manual_seed(1)
    made = batches(base, trained, 8)
    expected, objective = gradients(base, trained, made)
    assert objective.token.grad is not None
    seen, reference_pass = [], objectives.reference_pass

    def counted(*arguments):
        seen.append(arguments[2])
        return reference_pass(*arguments)

    monkeypatch.setattr(objectives, "reference_pass", counted)
    found, objective = gradients(base, frozen, made)
    assert objective.token.grad is None
    for one, other in zip(expected, found, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(one, other, strict=True))
    assert len(seen) == len({int(n) for batch in made for n in batch["photos"]}) == PHOTOS
