from dataclasses import replace
from shutil import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pfstorer_rt.config import PersonalizeConfig
from pfstorer_rt.errors import MismatchError, SettingError
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.models.prior import FILE, FOLDER
from pfstorer_rt.progress import CancelledError
from pfstorer_rt.training import reptile
from pfstorer_rt.training.personalize import instant_identity, personalize
from pfstorer_rt.training.reptile import ReptileConfig, add_prior, draw_person, people_of, rate_at, untrained_prior
from tests.training.test_one_step import NANO

CONFIG = ReptileConfig(people=2, steps=2, crops=2, rate=0.5, last_rate=0.5, train={"precision": "fp32", "batch": 1})


@pytest.fixture
def base():
    return build_base(NANO, seed=1)


@pytest.fixture
def people(photos, tmp_path):
    """A folder with two people: one with two photographs, one with a single file."""
    (tmp_path / "people" / "ann").mkdir(parents=True)
    for photo in photos[:2]:
        copy(photo, tmp_path / "people" / "ann")
    copy(photos[2], tmp_path / "people" / "bob.png")
    (tmp_path / "people" / "notes.txt").write_text("no person")
    return tmp_path / "people"


def weights(base):
    return torch.cat([p.detach().flatten() for p in base.prior.blocks.parameters()])


def test_a_folder_is_a_person_and_a_file_is_a_person(people):
    assert [[path.name for path in photos] for photos in people_of([people])] == [["0.png", "1.png"], ["bob.png"]]
    assert people_of([people / "bob.png"]) == [[people / "bob.png"]]


def test_the_prior_moves_towards_each_person(base, people, tmp_path, monkeypatch):
    """Each person has the weights 1 + noise: the prior approaches 1, nearer than the people."""
    noise = np.random.default_rng(0)

    def learned(photos, base, checkpoint, settings, mark):
        checkpoint.touch()
        state = base.prior.blocks.state_dict()
        return {n: 1 + torch.from_numpy(noise.normal(0, 0.3, v.shape)).float() for n, v in state.items()}, 0.0

    monkeypatch.setattr(reptile, "learn", learned)
    add_prior([people], base, tmp_path / "out", replace(CONFIG, people=40, last_rate=0.05), tmp_path / "work")
    assert abs(float(weights(base).mean()) - 1) < 0.01
    assert float(weights(base).std()) < 0.12, "a third of the noise of a person"


def test_the_first_people_count_equally(base, people, tmp_path, monkeypatch):
    def learned(photos, base, checkpoint, settings, mark):
        checkpoint.touch()
        return {n: torch.full_like(v, float(mark.split()[1])) for n, v in base.prior.blocks.state_dict().items()}, 0.0

    monkeypatch.setattr(reptile, "learn", learned)
    config = replace(CONFIG, people=4, rate=0.1, last_rate=0.1)
    add_prior([people], base, tmp_path / "out", config, tmp_path / "work")
    torch.testing.assert_close(weights(base), torch.full_like(weights(base), 1.5), atol=1e-3, rtol=0)  # 0, 1, 2, 3
    add_prior([people], base, tmp_path / "more", replace(config, people=1), tmp_path / "more work")
    torch.testing.assert_close(weights(base), torch.full_like(weights(base), 1.35), atol=1e-3, rtol=0)  # not a new one


def test_the_rate_falls_at_the_end():
    config = ReptileConfig(rate=0.3, last_rate=0.1, decay=0.5)
    assert [round(rate_at(share, config), 6) for share in (0, 0.5, 0.75, 1)] == [0.3, 0.3, 0.2, 0.1]
    assert rate_at(1.0, replace(config, decay=0.0)) == 0.3


def test_one_person_at_rate_1_becomes_the_prior(base, people, tmp_path):
    config = replace(CONFIG, people=1, rate=1.0, last_rate=1.0)
    add_prior([people], base, tmp_path / "out", config, tmp_path / "work")
    other = build_base(NANO, seed=1)
    other.prior = untrained_prior(other, 0)
    before = weights(other)
    photos = draw_person(people_of([people]), other.config.tile, config, np.random.default_rng([0, 51, 0]))
    settings = reptile.person_settings(other, config)
    seed = int(np.random.default_rng([0, 52, 0]).integers(1 << 31))
    settings = replace(settings, train=replace(settings.train, seed=seed))
    learned, _ = reptile.learn(photos, other, tmp_path / "person.pt", settings, "person 0")
    assert torch.equal(weights(other), before), "learning does not change the prior itself"
    assert any(not torch.equal(learned[name], value) for name, value in other.prior.blocks.state_dict().items())
    assert all(torch.equal(learned[name], value) for name, value in base.prior.blocks.state_dict().items())


def test_a_stopped_training_ends_as_an_uninterrupted_one(base, people, tmp_path):
    add_prior([people], base, tmp_path / "whole", CONFIG, tmp_path / "w1")

    def stop(progress):
        if progress.done == 1:
            raise CancelledError

    again = build_base(NANO, seed=1)
    with pytest.raises(CancelledError):
        add_prior([people], again, tmp_path / "parts", CONFIG, tmp_path / "w2", stop)
    seen = []
    again = build_base(NANO, seed=1)
    add_prior([people], again, tmp_path / "parts", CONFIG, tmp_path / "w2", lambda p: seen.append(p.done))
    assert seen == [1, 2]
    assert torch.equal(weights(again), weights(base))
    with pytest.raises(MismatchError, match="other settings"):
        add_prior([people], again, tmp_path / "other", replace(CONFIG, steps=3), tmp_path / "w2")


def test_an_identity_starts_from_the_stored_prior_and_is_not_instant(base, people, photos, tmp_path):
    base.save(tmp_path / "plain", torch.float16)
    fingerprint = base.fingerprint
    add_prior([people], base, tmp_path / "base", CONFIG, tmp_path / "work")
    loaded = load_base(tmp_path / "base")
    assert loaded.fingerprint == fingerprint, "the networks of the base stay as they are"
    assert not loaded.instant
    assert not any("shifts" in name for name in load_file(tmp_path / "base" / FOLDER / FILE)), "they are zero"
    assert torch.equal(weights(loaded), weights(base).half().float())
    config = PersonalizeConfig(start="prior", framing="none")
    with pytest.raises(SettingError, match="no prior"):
        instant_identity("alice", photos, loaded, config)
    train = replace(config.train, iterations=1, batch=1, precision="fp32", learning_rate=1e-7)
    slow = replace(config, train=train, gamma_learning_rate=1e-7)
    identity = personalize("alice", photos, loaded, slow, tmp_path / "alice.safetensors")
    for i, block in enumerate(loaded.prior.blocks):
        torch.testing.assert_close(
            identity.tensors[f"blocks.{i}.gamma"].float(), block.gamma.detach(), atol=1e-3, rtol=0
        )


def test_photographs_are_squares_of_at_most_a_tile(people):
    config = ReptileConfig(reduced=1.0, smallest=0.5)
    sides = {
        photo.shape[-2:]
        for seed in range(30)
        for photo in draw_person(people_of([people]), 64, config, np.random.default_rng(seed))
    }
    assert all(height == width and 32 <= width <= 64 for height, width in sides) and len(sides) > 10
    plain = draw_person(people_of([people]), 512, replace(config, reduced=0.0), np.random.default_rng(0))
    assert plain[0].shape[-2:] == (72, 72), "photographs are not enlarged"
