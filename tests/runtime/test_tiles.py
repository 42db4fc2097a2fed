from dataclasses import replace

import numpy as np
import pytest

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging.files import to_tensor
from pfstorer_rt.imaging.rows import Spool, from_pixels, read_pixels
from pfstorer_rt.runtime.layout import CodecTiles
from pfstorer_rt.runtime.restorer import Restorer
from pfstorer_rt.runtime.tiled_networks import Codec

CONFIG = RestoreConfig(steps=2, sampler="ddpm")
CHOPPED = TileConfig("parity", chop=128, chop_stride=96)


def tiles(**settings):
    return replace(CONFIG, tile=TileConfig(**settings))


def test_restoring_by_rows_equals_restoring_the_whole_image(restorer, make_image):
    pixels, config = make_image(150, 170), replace(CONFIG, scale=1.3)
    whole = restorer.restore(pixels, config)
    result = restorer.restore_rows(Spool.of(from_pixels(pixels)), config)
    assert (result.height, result.width) == whole.shape[:2]
    rows = np.concatenate([read_pixels(result, y, min(195, y + 20)) for y in range(0, 195, 20)])
    # Bands of the colour fix round differently.
    np.testing.assert_allclose(rows, whole, atol=1e-5)


@pytest.mark.parametrize("size", [(160, 256), (96, 200)])
def test_the_tiled_autoencoder_agrees_with_the_untiled(restorer, make_image, size):
    image, (height, width) = Spool.of(from_pixels(make_image(*size))), size

    def through(tile):
        """Encode and decode the image in tiles with margins of 32 pixels."""
        tiles = CodecTiles(height // 8, width // 8, tile // 8, 32 // 8)
        codec = Codec(restorer.sessions["encoder"], restorer.sessions["decoder"], tiles, 8)
        encoded, done = codec.encode(image, lambda n: None), []
        decoded = codec.decode(encoded.latents["mean"], codec.features(image, encoded, 0.0), done.append)
        return read_pixels(decoded, 0, height).astype(np.float64), len(done)

    (tiled, count), (untiled, one) = through(128), through(256)
    assert count > 1 == one
    assert -10 * np.log10(np.mean((tiled - untiled) ** 2)) >= 45


def test_tiles_share_one_field_of_noise(counted, make_image):
    restorer, sessions = counted
    restorer.restore(make_image(64, 96), replace(CONFIG, init="noise"))
    x = sessions["denoiser"].calls[0]["x"]
    assert len(x) == 2  # at latent columns 0 and 4
    assert np.array_equal(x[0][..., 4:], x[1][..., :4])


@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_out_of_memory_halves_the_batch_and_continues(restorer, counting, make_image, allowed):
    class Small(counting):
        def compute(self, **arrays):
            if len(arrays["x"]) > allowed:
                raise RuntimeError("[ONNXRuntimeError] : 6 : std::bad_alloc")
            return super().compute(**arrays)

    pixels = make_image(130, 200)
    small = Small(restorer.sessions["denoiser"])
    made = Restorer(restorer.manifest, {**restorer.sessions, "denoiser": small}, "torch")
    found = made.restore(pixels, tiles(batch=8))
    np.testing.assert_allclose(found, restorer.restore(pixels, tiles(batch=8)), atol=1e-4)
    assert max(len(call["x"]) for call in small.calls) == 1 << (allowed.bit_length() - 1)
    allowed = 0
    with pytest.raises(PFStorerError, match="too little memory for a single tile"):
        made.restore(pixels, tiles(batch=8))


def test_other_errors_do_not_count_as_out_of_memory(restorer, counting, make_image):
    class Broken(counting):
        def compute(self, **arrays):
            raise RuntimeError("no kernel")

    made = Restorer(restorer.manifest, {**restorer.sessions, "denoiser": Broken(restorer.sessions["denoiser"])}, "x")
    with pytest.raises(RuntimeError, match="no kernel"):
        made.restore(make_image(64, 64), CONFIG)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (130, 97), (300, 64), (20, 20)])
@pytest.mark.parametrize("tile", [TileConfig(batch=3), CHOPPED])
def test_every_tile_of_the_layout_is_run_once(counted, make_image, height, width, tile):
    restorer, sessions = counted
    config = replace(CONFIG, tile=tile, steps=3)
    layout = restorer.layout(height, width, config)
    restorer.restore(make_image(height, width), config)
    assert sum(len(call["x"]) for call in sessions["denoiser"].calls) == 3 * layout.denoiser_tiles
    assert len(sessions["encoder"].calls) == layout.codec_tiles
    assert max(len(call["x"]) for call in sessions["denoiser"].calls) == layout.batch


@pytest.mark.parametrize(("height", "width"), [(64, 160), (130, 97)])
@pytest.mark.parametrize(("mode", "stride"), [("parity", 32), ("fast", 48)])
def test_tiles_cover_a_larger_image(counted, make_image, height, width, mode, stride):
    restorer, sessions = counted
    found = restorer.restore(make_image(height, width), tiles(mode=mode))
    assert found.shape == (height, width, 3)
    assert np.isfinite(found).all()
    rows, columns = (-(-(-(-side // 32) * 32 - 64) // stride) + 1 for side in (height, width))
    denoised = sum(len(call["x"]) for call in sessions["denoiser"].calls)
    assert denoised == 2 * rows * columns  # 2 steps
    assert all(call["x"].shape[1:] == (4, 8, 8) == call["z_lq"].shape[1:] for call in sessions["denoiser"].calls)
    assert len(sessions["encoder"].calls) == len(sessions["decoder"].calls) == 1


def raised_cosine(side, overlap):
    """(1 - cos) / 2 from both ends inwards."""
    d = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
    return np.where(d < overlap, (1 - np.cos(np.pi * d / overlap)) / 2, 1)


@pytest.mark.parametrize("mode", ["parity", "fast"])
def test_tiled_prediction_is_the_weighted_mean_of_the_tiles(counted, make_image, mode):
    from pfstorer_rt.tiling import gaussian_weights

    restorer, sessions = counted
    pixels = make_image(64, 96)
    restorer.restore(pixels, replace(tiles(mode=mode, overlap=32), steps=1, color_fix="none"))
    (call,) = sessions["denoiser"].calls
    assert call["x"].shape[0] == 2
    outputs = sessions["denoiser"].session.run(**call)["prediction"].astype(np.float64)
    weights = gaussian_weights(8, 8) if mode == "parity" else np.outer(np.ones(8), raised_cosine(8, 4))
    total, mass = np.zeros((4, 8, 12)), np.zeros((8, 12))
    for tile, left in zip(outputs, (0, 4), strict=True):
        total[:, :, left : left + 8] += tile * weights
        mass[:, left : left + 8] += weights
    blended = total / mass
    x = np.concatenate([call["x"][0][:, :, :4], call["x"][1]], axis=-1).astype(np.float64)
    abar = 0.004660098513  # the published value at t = 999
    clean = (x - np.sqrt(1 - abar) * blended) / np.sqrt(abar)
    decoded = sessions["decoder"].calls[0]["latent"][0]
    # One step of DDPM returns its estimate; dividing by sqrt(abar) = 0.07 scales fp32 rounding up.
    assert np.allclose(decoded, clean, rtol=0, atol=1e-4)


def test_the_tile_batch_does_not_change_the_result(restorer, make_image):
    pixels = make_image(96, 128)
    one, many = (restorer.restore(pixels, tiles(batch=batch)) for batch in (1, 16))
    assert np.allclose(one, many, rtol=0, atol=1e-4)


def test_overlap_changes_the_tiles(counted, make_image):
    restorer, sessions = counted
    restorer.restore(make_image(64, 128), tiles(overlap=0))
    assert sum(len(call["x"]) for call in sessions["denoiser"].calls) == 2 * 2


def test_a_large_image_is_restored_in_squares(counted, make_image):
    restorer, sessions = counted
    chopped = replace(CONFIG, tile=CHOPPED, colorize=True)  # the networks see the image as it is
    pixels = make_image(128, 224)
    found = restorer.restore(pixels, chopped)
    assert found.shape == pixels.shape
    assert np.isfinite(found).all()
    encoded = [call["image"] for call in sessions["encoder"].calls]
    assert [e.shape[-2:] for e in encoded] == [(128, 128), (128, 128)]  # at columns 0 and 96
    planes = to_tensor(pixels).numpy()
    assert np.array_equal(encoded[0], planes[..., :128])
    assert np.array_equal(encoded[1], planes[..., 96:])
    # Outside the overlap each square equals the square restored alone with the same seed.
    alone = restorer.restore(pixels[:, :128], chopped)
    assert np.allclose(found[:, :90], alone[:, :90], rtol=0, atol=1e-5)
    alone = restorer.restore(np.ascontiguousarray(pixels[:, 96:]), chopped)
    assert np.allclose(found[:, 134:], alone[:, 38:], rtol=0, atol=1e-5)


def test_an_image_with_one_long_side_is_restored_in_squares(restorer, make_image):
    found = restorer.restore(make_image(64, 300), replace(CONFIG, tile=CHOPPED))
    assert found.shape == (64, 300, 3)
    assert np.isfinite(found).all()


def test_progress_counts_every_step_once(restorer, make_image):
    def steps(height, width, config):
        seen = []
        restorer.restore(make_image(height, width), config, lambda done, total: seen.append((done, total)))
        return seen

    # One tile through encoder and decoder, and once a step through the denoiser.
    assert steps(64, 64, replace(CONFIG, steps=3)) == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert steps(64, 160, CONFIG) == [(1, 8), (4, 8), (7, 8), (8, 8)]  # three tiles go through at once
    for config in (tiles(batch=2), replace(CONFIG, tile=CHOPPED)):
        done = [d for d, _ in steps(128, 224, config)]
        assert done == sorted(set(done)) and done[-1] == restorer.layout(128, 224, config).total
