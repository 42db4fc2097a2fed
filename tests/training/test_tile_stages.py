import stat
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from pfstorer_rt.config import TrainConfig
from pfstorer_rt.errors import BadFileError, MissingBackendError, SettingError
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.training.prior import PriorConfig
from pfstorer_rt.training.tile_stages import TileStageConfig, train_tile_stage
from tests.training.test_one_step import NANO

TRAIN = {"iterations": 2, "batch": 2, "precision": "fp32", "minutes": None}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)).save(tmp_path / "photos" / f"{k}.png")
    return f"{tmp_path / 'photos'}=2"


def stage(name, **values):
    return TileStageConfig(name, preset="nano", tiles=16, workers=0, train=TRAIN, **values)


def test_each_stage_starts_from_the_base_of_the_previous_stage(photos, tmp_path):
    notes = []
    first = train_tile_stage([photos], tmp_path / "first", stage("autoencoder"), tmp_path / "w1", note=notes.append)
    assert len(notes) == 1 and "without the LPIPS loss" in notes[0]
    assert (tmp_path / "w1" / "autoencoder.csv").exists()
    assert stat.S_IMODE((tmp_path / "w1").stat().st_mode) == 0o700, "the tiles show faces"
    prior = load_base(tmp_path / "first")
    assert prior.fingerprint == first.fingerprint
    encoder = {name: value.clone() for name, value in prior.vae.state_dict().items()}
    before = prior.unet.conv_in.weight.clone()
    train_tile_stage([photos], tmp_path / "second", stage("restorer"), tmp_path / "w2", prior)
    second = load_base(tmp_path / "second")
    assert not torch.equal(second.unet.conv_in.weight, before)
    assert all(torch.equal(value, encoder[name]) for name, value in second.vae.state_dict().items())


def test_missing_inputs_of_a_stage_are_named_before_tiles_are_made(photos, tmp_path):
    for name in ("restorer", "one-step"):
        with pytest.raises(BadFileError, match="a trained autoencoder"):
            train_tile_stage([photos], tmp_path / "out", stage(name), tmp_path / "w")
    with pytest.raises(MissingBackendError, match="LPIPS"):
        train_tile_stage(
            [photos], tmp_path / "out", stage("one-step", identity=False), tmp_path / "w", build_base("nano")
        )
    assert not (tmp_path / "w").exists()


@pytest.fixture
def brief_matching(monkeypatch):
    """The stage people starts with 2 iterations on latents; its default is 500."""
    brief = TrainConfig(iterations=2, batch=2, precision="fp32")
    monkeypatch.setattr("pfstorer_rt.training.tile_stages.PriorConfig", partial(PriorConfig, matching=brief))


def test_the_stage_people_trains_the_base_and_its_prior(photos, tmp_path, random_lpips, brief_matching):
    rng = np.random.default_rng(1)
    for person in "ab":
        (tmp_path / "people" / person).mkdir(parents=True)
        for k in range(2):
            pixels = rng.integers(0, 256, (80, 80, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "people" / person / f"{k}.png")
    base = build_base(NANO, seed=1)
    before = base.unet.conv_in.weight.clone()
    settings = {"lpips": random_lpips, "identity": False}
    with pytest.raises(SettingError, match="folders of people"):
        train_tile_stage([photos], tmp_path / "out", stage("people", **settings), tmp_path / "w", base)
    config = stage("people", people=(tmp_path / "people",), **settings)
    train_tile_stage([photos], tmp_path / "out", config, tmp_path / "w", base)
    trained = load_base(tmp_path / "out")
    assert trained.prior is not None and not torch.equal(trained.unet.conv_in.weight, before)
