import numpy as np
import pytest
import torch
from PIL import Image

from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.models.base import load_base
from pfstorer_rt.training.parts import PartConfig, train_part

TRAIN = {"iterations": 2, "batch": 2, "precision": "fp32", "minutes": None}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)).save(tmp_path / "photos" / f"{k}.png")
    return f"{tmp_path / 'photos'}=2"


def part(name, **values):
    return PartConfig(name, preset="nano", tiles=16, workers=0, train=TRAIN, **values)


def test_each_part_starts_from_the_base_of_the_previous_part(photos, tmp_path):
    first = train_part([photos], tmp_path / "first", part("autoencoder"), tmp_path / "w1")
    assert (tmp_path / "w1" / "autoencoder.csv").exists()
    prior = load_base(tmp_path / "first")
    assert prior.fingerprint == first.fingerprint
    encoder = {name: value.clone() for name, value in prior.vae.state_dict().items()}
    before = prior.unet.conv_in.weight.clone()
    train_part([photos], tmp_path / "second", part("restorer"), tmp_path / "w2", prior)
    second = load_base(tmp_path / "second")
    assert not torch.equal(second.unet.conv_in.weight, before)
    assert all(torch.equal(value, encoder[name]) for name, value in second.vae.state_dict().items())


def test_missing_inputs_of_a_part_are_named(photos, tmp_path):
    for name in ("restorer", "one-step"):
        with pytest.raises(BadFileError, match="a trained autoencoder"):
            train_part([photos], tmp_path / "out", part(name), tmp_path / "w")
    from pfstorer_rt.models.base import build_base

    with pytest.raises(MissingBackendError, match="LPIPS"):
        train_part([photos], tmp_path / "out", part("one-step", identity=False), tmp_path / "w", build_base("nano"))
