import numpy as np
import pytest
import torch

from pfstorer_rt.engine.session import Session
from pfstorer_rt.runtime import tiled_networks
from pfstorer_rt.runtime.layout import CodecTiles
from pfstorer_rt.runtime.tiled_networks import Codec


class Shuffle(Session):
    """An encoder or decoder that moves pixels between space and channels; the decoder adds the features it gets."""

    provider = "test"

    def __init__(self, *inputs):
        self.inputs, self.calls = inputs, 0

    def compute(self, **arrays):
        self.calls += 1
        a = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if "image" in a:
            return {"mean": torch.nn.functional.pixel_unshuffle(a["image"], 8).numpy(), "features_1": arrays["image"]}
        return {
            "image": (torch.nn.functional.pixel_shuffle(a["latent"], 8) + a["features_1"] * a["cfw_weight"]).numpy()
        }


class Recorded:
    """Rows of noise (3, 96, 160) that record which of them are read."""

    height, width = 96, 160
    image = np.random.default_rng(0).uniform(-1, 1, (3, height, width)).astype(np.float32)

    def __init__(self):
        self.reads = []

    def read(self, start, stop):
        self.reads.append((start, stop))
        return self.image[:, start:stop]


def restored(codec, style, weight):
    """The decoded rows of an encoded image."""
    encoded = codec.encode(style, lambda n: None)
    latent = encoded.latents["mean"]
    return codec.decode(latent, codec.features(style, encoded, weight), lambda n: None).read(0, style.height)


@pytest.mark.parametrize("kept", [True, False])
def test_features_are_computed_once_if_they_are_small(kept, monkeypatch):
    style, encoder = Recorded(), Shuffle("image")
    codec = Codec(encoder, Shuffle("latent", "features_1", "cfw_weight"), CodecTiles(12, 20, 8, 2), 8)
    size = 2 * 4 * 4 * 3 * 64 * 64  # bytes of the features of all tiles
    monkeypatch.setattr(tiled_networks, "KEPT", size if kept else size - 1)
    found = restored(codec, style, 0.5)
    # A band is read once for all tiles of a row.
    assert style.reads == [(0, 64), (32, 96)] * (1 if kept else 2) and encoder.calls == 8 * (1 if kept else 2)
    # Every tile was decoded with the features of its own part of the image.
    np.testing.assert_allclose(found, 1.5 * style.image, rtol=1e-6)


def test_features_of_other_tiles_are_computed_again():
    style, encoder = Recorded(), Shuffle("image")
    codec = Codec(encoder, Shuffle("latent", "features_1", "cfw_weight"), CodecTiles(12, 20, 8, 2), 8)
    encoded = codec.encode(style, lambda n: None)
    smaller = codec._replace(tiles=codec.tiles.halved())
    features = smaller.features(style, encoded, 0.5)
    found = smaller.decode(encoded.latents["mean"], features, lambda n: None).read(0, 96)
    np.testing.assert_allclose(found, 1.5 * style.image, rtol=1e-6)


def test_the_features_of_a_whole_canvas_are_kept_whatever_their_size(monkeypatch):
    style, encoder = Recorded(), Shuffle("image")
    codec = Codec(encoder, Shuffle("latent", "features_1", "cfw_weight"), CodecTiles(12, 20, 64, 2), 8)
    monkeypatch.setattr(tiled_networks, "KEPT", 0)
    np.testing.assert_allclose(restored(codec, style, 0.0), style.image, rtol=1e-6)
    assert encoder.calls == 1 and style.reads == [(0, 96)]
