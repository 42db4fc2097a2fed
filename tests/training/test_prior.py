from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pfstorer_rt.config import PersonalizeConfig, TrainConfig
from pfstorer_rt.diffusion import noisy_latent
from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.identity import Identity
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.models.personalization import PersonalizationBlock, PersonalizationBlocks, build_blocks
from pfstorer_rt.models.prior import FOLDER, Prior
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.one_step import OneStepConfig
from pfstorer_rt.training.personalize import instant_identity, personalize
from pfstorer_rt.training.prior import (
    PeopleSampler,
    PriorConfig,
    PriorObjective,
    ReferenceObjective,
    cut,
    feature_scales,
    in_square,
    match_features,
    reference_taps,
    train_prior,
)
from tests.training.test_one_step import NANO, latents_of

TRAIN = TrainConfig(iterations=2, batch=2, learning_rate=1e-3, precision="fp32")
MATCHING = TrainConfig(iterations=2, batch=2, precision="fp32")
CONFIG = PriorConfig(MATCHING, base=OneStepConfig(train=TRAIN, window=4, cropped=1.0), crop=4, window=3, references=3)


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


def test_blocks_start_as_a_search_for_similar_features():
    """Noisy features move towards the feature of the reference that they resemble, and not towards another one."""
    torch.manual_seed(0)
    blocks = PersonalizationBlocks([PersonalizationBlock(64, 32, layer="a")])
    match_features(blocks, {"a": 1.0})
    blocks[0].gamma.data.fill_(0.5)
    reference = F.layer_norm(torch.randn(1, 20, 64), (64,))
    x = F.layer_norm(reference[:, :5] + 0.3 * torch.randn(1, 5, 64), (64,))
    moved = blocks[0](x, reference) - x
    towards = F.cosine_similarity(moved, reference[:, :5] - x, dim=-1)
    elsewhere = F.cosine_similarity(moved, reference[:, 5:10] - x, dim=-1)
    assert towards.min() > 0.5 and elsewhere.max() < towards.min()


def known_of(base, latents):
    return ReferenceObjective(base, feature_scales(base, torch.from_numpy(latents[:2, 0, 0])))


def test_the_features_of_clean_and_degraded_images_are_of_one_timestep(base, people):
    """The features of a reference that equals the input are those of the restoring pass with the same noise."""
    latents = torch.from_numpy(latents_of(base, people)[:2, 0, 0])
    known, layer = known_of(base, latents_of(base, people)), NANO.layers[-1]
    seen = reference_taps(known, latents[:, None])[layer].keywords["reference"]
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(latents)
    t, kept = torch.full((2,), 999), {}
    x = noisy_latent(latents, latents, noise, t, base.schedule.alphas_cumprod_tensor())
    subject = known.text_encoder(known.subject_ids, known.token).expand(2, -1, -1)
    with torch.no_grad():
        base.unet(x, t, subject, base.structure_encoder(latents, t), {layer: lambda h: kept.setdefault(layer, h)})
    torch.testing.assert_close(seen, kept[layer])


def test_the_training_on_latents_uses_the_references(base, people):
    """A few iterations on a pool whose references contain the answer lower the error."""
    latents = latents_of(base, people)
    torch.manual_seed(0)
    known, sampler = known_of(base, latents), PeopleSampler(people, latents, replace(CONFIG, same_photo=1.0))
    optimizer = torch.optim.Adam(known.blocks.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = known(sampler.latents_of(0, 4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in base.unet.parameters())


def test_gradients_reach_the_base_and_the_blocks(base, people, lpips):
    latents = latents_of(base, people)
    objective = PriorObjective(base, CONFIG, Lpips(lpips), None, known_of(base, latents))
    for module in (base.unet, base.cfw, base.vae.decoder, base.structure_encoder):
        module.requires_grad_(True)
    losses = objective.with_references(PeopleSampler(people, latents, CONFIG)(0))
    losses["loss"].backward()
    for module in (objective.blocks, base.unet, base.cfw, base.vae.decoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    for block in objective.blocks:
        assert block.gamma.grad.abs().sum() > 0 and block.block.attn2.to_k.weight.grad.abs().sum() > 0


def test_a_grid_in_samples_with_references_costs_as_much_as_in_the_others(base, people, lpips, monkeypatch):
    latents = latents_of(base, people)
    objective = PriorObjective(base, CONFIG, Lpips(lpips), None, known_of(base, latents))
    batch = PeopleSampler(people, latents, CONFIG)(0)
    dots = (torch.arange(batch["hq_crop"].shape[-1]) % base.config.factor == 0).float()
    monkeypatch.setattr(objective, "decode", lambda *_: batch["hq_crop"] + 0.1 * dots[:, None] * dots)
    losses = objective.with_references(batch)
    objective.config = replace(CONFIG.base, lambda_repeated=0.0)
    without = objective.with_references(batch)
    assert losses["repeated"] > 5e-4
    torch.testing.assert_close(losses["loss"] - without["loss"], 4 * losses["repeated"], rtol=0, atol=1e-5)


def test_all_references_are_attended(base, people):
    known = known_of(base, latents_of(base, people))
    references = torch.randn(2, 3, 4, 8, 8)
    tap = reference_taps(known, references)[NANO.layers[-1]]
    assert isinstance(tap, partial) and tap.keywords["reference"].shape[:2] == (2, 3 * 8 * 8)
    one = reference_taps(known, references[:, 2:])[NANO.layers[-1]].keywords["reference"]
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


def with_shifts(base):
    """Give a base a prior whose blocks act and whose shifts are random."""
    torch.manual_seed(5)
    base.prior = Prior(base.unet, base.config)
    base.prior.shifts.mean.fill_(0.05)
    for block, linear in zip(base.prior.blocks, base.prior.shifts.maps, strict=True):
        block.gamma.data.fill_(0.5)
        torch.nn.init.normal_(linear.weight, std=0.05)
    return base.prior


def test_the_shifts_are_linear_in_the_distance_to_the_mean_embedding(base):
    prior, face = with_shifts(base), np.random.default_rng(0).normal(0, 0.1, 128).astype(np.float32)
    expected = prior.shifts.maps[2].weight.detach().numpy() @ ((face - 0.05) / 0.1)
    found = prior.shifts(torch.from_numpy(face)[None])[2][0].detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(shift.any() for shift in prior.shifts(torch.full((1, 128), 0.05)))


def test_a_shift_acts_as_the_bias_of_an_identity(base):
    """In a batch, each person has another shift; an identity has the shift in its bias."""
    prior, faces = with_shifts(base), torch.randn(2, 128) * 0.1
    x, reference = torch.randn(2, 5, prior.blocks[1].gamma.numel()), torch.randn(2, 7, prior.blocks[1].gamma.numel())
    together = prior.blocks[1](x, reference, shift=prior.shifts(faces)[1])
    for i, face in enumerate(faces):
        blocks = build_blocks(base.unet, base.config.layers, base.config.head_size)
        prior.copy_to(blocks, face)
        alone = blocks[1](x[i : i + 1], reference[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-4)
    assert (together - prior.blocks[1](x, reference)).abs().max() > 0.01


def test_an_identity_starts_with_the_embedding_of_its_photographs(base, photos, monkeypatch):
    prior, face = with_shifts(base), np.linspace(-0.2, 0.2, 128)
    config = PersonalizeConfig(start="prior", framing="none", keep_all=True)
    found = {}
    for name, embedding in (("face", face), ("none", None)):
        monkeypatch.setattr("pfstorer_rt.training.personalize.face_embedder", lambda e=embedding: lambda _: e)
        identity = instant_identity("alice", photos, base, config)
        found[name] = identity.tensors["blocks.0.block.ff.net.0.proj.bias"].float()
    bias = prior.blocks[0].block.ff.net[0].proj.bias.detach()
    shift = prior.shifts(torch.from_numpy(face).half().float()[None])[0][0].detach()
    torch.testing.assert_close(found["face"], bias + shift, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(found["none"], bias, atol=1e-3, rtol=1e-2)


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
