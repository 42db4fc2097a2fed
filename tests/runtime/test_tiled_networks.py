import numpy as np
import torch

from pfstorer_rt.engine.session import Session
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


def test_a_band_is_read_once_for_all_tiles_of_a_row():
    style, encoder = Recorded(), Shuffle("image")
    codec = Codec(encoder, Shuffle("latent", "features_1", "cfw_weight"), CodecTiles(12, 20, 8, 2), 8)
    encoded = codec.encode(style, lambda n: None)
    assert style.reads == [(0, 64), (32, 96)] and encoder.calls == 2 * 4
    assert set(encoded) == {"mean"}  # the features of all tiles would fill the memory
    style.reads.clear()
    decoded = codec.decode(encoded["mean"], codec.features(style, encoded, 0.5), lambda n: None)
    assert style.reads == [(0, 64), (32, 96)]
    # Every tile was decoded with the features of its own part of the image.
    np.testing.assert_allclose(decoded.read(0, 96), 1.5 * style.image, rtol=1e-6)


def test_the_features_of_a_whole_canvas_are_computed_once():
    style, encoder = Recorded(), Shuffle("image")
    codec = Codec(encoder, Shuffle("latent", "features_1", "cfw_weight"), CodecTiles(12, 20, 64, 2), 8)
    encoded = codec.encode(style, lambda n: None)
    decoded = codec.decode(encoded["mean"], codec.features(style, encoded, 0.0), lambda n: None)
    assert encoder.calls == 1 and style.reads == [(0, 96)]
    np.testing.assert_allclose(decoded.read(0, 96), style.image, rtol=1e-6)
