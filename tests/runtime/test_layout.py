import pytest

from pfstorer_rt.config import RestoreConfig, TileConfig
from pfstorer_rt.plan import Manifest
from pfstorer_rt.runtime.layout import Layout
from pfstorer_rt.runtime.recipe import Recipe
from pfstorer_rt.tiling import Tile

MANIFEST = Manifest("onnx", "fp32", 64, 8, 4, "epsilon", "ddpm", 4, "nano", "0" * 64)


def layout(height, width, variational=False, scale=1.0, **tile):
    recipe = Recipe.resolve(RestoreConfig(scale=scale, tile=TileConfig(**tile)), MANIFEST)
    return Layout.of(height, width, recipe, MANIFEST, variational)


def test_a_small_image_is_one_tile_in_every_network():
    found = layout(40, 60)
    assert found.canvas.padded == (64, 96) and found.squares == (Tile(0, 0, 64, 96),)
    assert found.tiles == (Tile(0, 0, 8, 8), Tile(0, 4, 8, 8))  # latent pixels
    assert (found.denoiser_tiles, found.codec_tiles, found.batch) == (2, 1, 2)
    assert found.total == 4 * 2 + 2


def test_parity_mode_cuts_squares_of_equal_size():
    found = layout(128, 224, mode="parity", chop=128, chop_stride=96)
    assert found.squares == (Tile(0, 0, 128, 128), Tile(0, 96, 128, 128))
    assert len(found.tiles) == 3 * 3 and found.denoiser_tiles == 18  # overlap of half a tile
    assert found.codec_tiles == 2 and found.codec.shape == (16, 16)
    assert len(layout(128, 224, chop=128).squares) == 1  # the default mode has none


@pytest.mark.parametrize(("variational", "tiles"), [(False, 3 * 4), (True, 1 * 2)])
def test_norms_of_a_variational_encoder_need_larger_tiles(variational, tiles):
    # Strides of 512 - 2 * 32 and 1280 - 2 * 128 pixels.
    assert layout(1280, 1600, variational).codec_tiles == tiles


def test_the_scale_enlarges_the_canvas():
    assert layout(100, 70, scale=2.0).facts() == {
        "height": 224,
        "width": 160,
        "tiles": 5 * 3,
        "codec_tiles": 1,
        "steps": 4,
        "batch": 4,
        "squares": 1,
    }
