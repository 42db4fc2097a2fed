from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pfstorer_rt.config import PRESETS
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.models.components import Decoder, Encoder

CONFIG = replace(PRESETS["nano"], cfw={"widths": (8, 8), "growth": 4}, cfw_weight=1.0)


@pytest.fixture
def base():
    """A nano base whose fusion layers do something."""
    made = build_base(CONFIG, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in made.cfw.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def images(seed=0):
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def conv(layer, x, padding=0):
    return F.conv2d(x, layer.weight, layer.bias, padding=padding)


def levels_of_encoder(vae, image):
    """Maps after each level's blocks, by their size."""
    h, maps = image.add(1).div(2), {}
    for layer in vae.encoder.layers[:-1]:
        h = layer(h)
        maps[h.shape[-1]] = h
    return [maps[width] for width in sorted(maps, reverse=True)]


@torch.no_grad()
def test_feature_wrapping_computes_the_formula(base):
    image, latent = images(), base.encode(images(1))
    maps, h = levels_of_encoder(base.vae, image), torch.tanh(latent / 3) * 3
    for i, layer in enumerate(base.vae.decoder.layers):
        above = image.shape[-1] // h.shape[-1]  # pixels for one of the map's
        if isinstance(layer, torch.nn.Upsample) and above in (2, 4):
            level = {2: 1, 4: 2}[above]
            fusion = base.cfw.layer(level)
            a = F.relu(conv(fusion.narrow_encoded, maps[level]) + conv(fusion.narrow_decoded, h))
            a = F.relu(conv(fusion.conv2, F.relu(conv(fusion.conv1, a, 1)), 1))
            h = h + 0.7 * conv(fusion.widen, a)
        h = layer(h)
        assert i or h.shape[1] == 8
    expected = h * 2 - 1
    torch.testing.assert_close(base.decode(latent, base.features(image), 0.7), expected, atol=1e-5, rtol=1e-5)
    mean, *features = Encoder(base)(image)
    torch.testing.assert_close(mean, base.encode(image))
    torch.testing.assert_close(Decoder(base)(latent, *features, torch.tensor([0.7])), expected, atol=1e-5, rtol=1e-5)
    assert (expected - base.decode(latent)).abs().max() > 1e-2


@torch.no_grad()
def test_untrained_feature_wrapping_and_weight_0_equal_the_plain_decoder(base):
    image, latent = images(), base.encode(images(1))
    assert torch.equal(base.decode(latent, base.features(image), 0.0), base.decode(latent))
    untrained = build_base(CONFIG, seed=1)
    assert torch.equal(untrained.decode(latent, untrained.features(image), 1.0), untrained.decode(latent))


def test_feature_wrapping_is_saved_with_its_weight(base, tmp_path):
    base.save(tmp_path / "a")
    loaded = load_base(tmp_path / "a")
    assert loaded.fingerprint == base.fingerprint and loaded.config.cfw_weight == 1.0
    assert all(torch.equal(v, loaded.cfw.state_dict()[k]) for k, v in base.cfw.state_dict().items())
