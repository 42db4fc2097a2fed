from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.models.prior import FOLDER, Prior
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.objectives import PersonalizationObjective
from pfstorer_rt.training.one_step import OneStepConfig
from pfstorer_rt.training.personalize import instant_identity, personalize
from pfstorer_rt.training.prior import (
    PeopleSampler,
    PriorConfig,
    PriorObjective,
    copy_layers,
    cut,
    feature_scales,
    in_square,
    train_prior,
)
from tests.training.test_one_step import NANO, latents_of

TRAIN = TrainConfig(iterations=2, batch=2, learning_rate=1e-3, precision="fp32")
CONFIG = PriorConfig(OneStepConfig(train=TRAIN, window=4, cropped=1.0), crop=4, window=3, references=3)


@pytest.fixture
def base():
    return build_base(NANO, seed=1)


@pytest.fixture
def people():
    """A pool of three people with three photographs each."""
    rng = np.random.default_rng(0)
    hq = rng.integers(0, 256, (9, 128, 128, 3), np.uint8)
    return {
        "hq": hq,
        "lq": np.stack([hq // 2, 255 - hq], 1),
        "maps": np.tile(np.array([[0.3, 0, -0.4], [0, 0.3, 0.2]], np.float32), (9, 1, 1)),
        "person": np.repeat(np.arange(3), 3),
        "photo": np.tile(np.arange(3), 3),
    }


@pytest.fixture
def lpips(random_lpips):
    return random_lpips


def test_references_are_other_photographs_of_the_same_person(base, people):
    """The first value of each latent is the number of its tile."""
    latents = latents_of(base, people)
    latents[..., 0, 0, 0] = np.arange(9)[:, None, None]
    sampler = PeopleSampler(people, latents, CONFIG)
    counts = set()
    for number in range(30):
        batch = sampler(number)
        counts.add(batch["references"].shape[1])
        for target, references in zip(
            batch["hq"][:, 0, 0, 0].int(), batch["references"][:, :, 0, 0, 0].int(), strict=True
        ):
            assert {int(r) // 3 for r in references} == {int(target) // 3}
            assert int(target) not in references.tolist()
    assert counts == {1, 2, 3}


def test_crops_lie_around_the_face(base, people):
    """The map of a face names the same pixels in the crop as in the tile."""
    sampler = PeopleSampler(people, latents_of(base, people), CONFIG)
    for number in range(8):
        batch = sampler(number)
        assert batch["hq_crop"].shape == (2, 3, 96, 96)
        assert batch["places"].min() >= 0 and batch["places"].max() <= 2
        assert batch["corners"].min() >= 0 and batch["corners"].max() <= 1
    face = np.array([[0.25, 0, 0.5], [0, 0.25, -0.5]])  # centre at (96, 32) of 128 pixels, 32 pixels wide
    moved = in_square(face.copy(), np.array([1, 4]), 4, 8)  # the square of pixels 16..79, 64..127
    np.testing.assert_allclose(moved, [[0.5, 0, 0.0], [0, 0.5, -0.5]])


def test_cut_takes_another_square_of_each_map():
    maps = torch.arange(2 * 16.0).reshape(2, 1, 4, 4)
    found = cut(maps, torch.tensor([[0, 1], [2, 0]]), 2)
    assert found[0, 0].tolist() == [[1, 2], [5, 6]] and found[1, 0].tolist() == [[24, 25], [28, 29]]


def test_blocks_start_with_the_layers_self_attention(base):
    """Queries of a block equal the queries of the layer, computed through its input projection."""
    made = PersonalizationObjective(base, PersonalizeConfig()).blocks
    copy_layers(base.unet, made, dict.fromkeys(base.config.layers, 2.0))
    for block in made:
        layer = base.unet.get_submodule(block.layer)
        x = torch.randn(1, 5, block.gamma.numel())
        own, new = layer.transformer_blocks[-1].attn1, block.block
        plain = torch.nn.functional.linear(x, layer.proj_in.weight)
        torch.testing.assert_close(new.attn2.to_q(x), own.to_q(plain), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(new.attn2.to_k(2 * x), own.to_k(plain), atol=1e-5, rtol=1e-4)
        assert (block.gamma == 0.1).all()


def test_gradients_reach_the_base_and_the_blocks(base, people, lpips):
    latents = latents_of(base, people)
    scales = feature_scales(base, torch.from_numpy(latents[:2, 0, 0]))
    objective = PriorObjective(base, CONFIG, Lpips(lpips), None, scales)
    for module in (base.unet, base.cfw, base.vae.decoder, base.structure_encoder):
        module.requires_grad_(True)
    losses = objective.with_references(PeopleSampler(people, latents, CONFIG)(0))
    losses["loss"].backward()
    for module in (objective.blocks, base.unet, base.cfw, base.vae.decoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    for block in objective.blocks:
        assert block.gamma.grad.abs().sum() > 0 and block.block.attn2.to_k.weight.grad.abs().sum() > 0


def test_all_references_are_attended(base, people, lpips):
    objective = PriorObjective(base, CONFIG, Lpips(lpips), None, dict.fromkeys(NANO.layers, 1.0))
    references = torch.randn(2, 3, 4, 8, 8)
    tap = objective.taps(references)[NANO.layers[-1]]
    assert isinstance(tap, partial) and tap.keywords["reference"].shape[:2] == (2, 3 * 8 * 8)
    one = objective.taps(references[:, 2:])[NANO.layers[-1]].keywords["reference"]
    torch.testing.assert_close(tap.keywords["reference"][:, -64:], one, atol=1e-4, rtol=1e-3)


def test_a_prior_is_trained_saved_and_used(base, people, lpips, photos, tmp_path):
    tiles = {name: people[name][:6] for name in ("hq", "lq", "maps")}
    before = base.fingerprint
    train_prior(people, tiles, base, tmp_path / "work", CONFIG, lpips, None)
    assert base.prior is not None and base.fingerprint != before
    base.save(tmp_path / "base", torch.float16)
    loaded = load_base(tmp_path / "base")
    states = loaded.prior.state_dict(), base.prior.state_dict()
    assert all(torch.equal(states[0][name], states[1][name].half().float()) for name in states[1])
    config = replace(PersonalizeConfig.for_base(loaded.config), start="prior", masked=False, references=2, p_self=0.0)
    identity = instant_identity("alice", photos, loaded, config)
    for i, block in enumerate(loaded.prior.blocks):
        assert torch.equal(identity.tensors[f"blocks.{i}.gamma"].float(), block.gamma)
    assert identity.tensors["reference.5"].shape[0] == 2 * 8 * 8 and bool(identity.tensors["mask.5"].all())
    path = tmp_path / "alice.safetensors"
    longer = replace(
        config,
        gamma_learning_rate=1e-3,
        train=TrainConfig(iterations=1, batch=1, device="cpu", precision="fp32", learning_rate=1e-6),
    )
    tuned = personalize("alice", photos, loaded, longer, path)
    torch.testing.assert_close(
        tuned.tensors["blocks.0.gamma"].float(), identity.tensors["blocks.0.gamma"].float(), atol=2e-3, rtol=0
    )
    assert Identity.load(path).fingerprint == tuned.fingerprint


def test_an_instant_identity_needs_a_prior(base, photos):
    with pytest.raises(SettingError, match="no prior"):
        instant_identity("alice", photos, base, replace(PersonalizeConfig(), start="prior"))
    base.prior = Prior(base.unet, base.config)
    with pytest.raises(SettingError, match="no prior"):
        instant_identity("alice", photos, base, PersonalizeConfig(start="prior", rank=2))


@pytest.mark.parametrize(("change", "message"), [("shape", "other layers"), ("nan", "not finite")])
def test_a_damaged_prior_is_refused(base, tmp_path, change, message):
    base.prior = Prior(base.unet, base.config)
    if change == "nan":
        base.prior.blocks[0].gamma.data.fill_(float("nan"))
    else:
        base.prior.token = torch.nn.Parameter(torch.zeros(3))
    base.save(tmp_path / "base")
    assert (tmp_path / "base" / FOLDER).is_dir()
    with pytest.raises(BadFileError, match=message):
        load_base(tmp_path / "base")


def test_a_base_without_a_prior_removes_an_older_one(base, tmp_path):
    base.prior = Prior(base.unet, base.config)
    base.save(tmp_path / "base")
    base.prior = None
    base.save(tmp_path / "base")
    assert not (tmp_path / "base" / FOLDER).exists() and load_base(tmp_path / "base").prior is None
