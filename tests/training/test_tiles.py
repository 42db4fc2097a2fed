import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.training.tile_pool import PoolConfig, make_pool, parse_source
from pfstorer_rt.training.tiles import Source, TileComposer, draw_scale, rotate


def photographs(folder, side, count=3, mode="checks"):
    """Images with a pattern of single pixels, which any enlargement changes, or of one colour."""
    folder.mkdir()
    for k in range(count):
        checks = np.indices((side, side)).sum(0) % 2 * 255
        pixels = np.full((side, side, 3), 80 * k + 40) if mode == "plain" else np.repeat(checks[..., None], 3, 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    return Source(sorted(folder.glob("*.png")), 1.0)


def test_a_tile_is_a_function_of_seed_and_number(tmp_path):
    source = photographs(tmp_path / "a", 90, mode="plain")
    first, second = TileComposer([source], 64, 5), TileComposer([source], 64, 5)
    assert np.array_equal(first(3)[0], second(3)[0])
    assert any(not np.array_equal(first(3)[0], first(n)[0]) for n in range(4, 9))


def test_small_photographs_fill_the_tile_at_their_own_size(tmp_path):
    tile, _ = TileComposer([photographs(tmp_path / "a", 50)], 128, 0)(0)
    assert tile.shape == (128, 128, 3)
    assert set(np.unique(tile)) == {0, 255}, "a resized check has values in between"
    assert 0.45 < (tile == 255).mean() < 0.55, "every place is covered"


def test_several_photographs_share_a_tile(tmp_path):
    tile, _ = TileComposer([photographs(tmp_path / "a", 40, mode="plain")], 128, 0)(0)
    assert len(np.unique(tile)) == 3


def test_large_photographs_are_cut_from_many_scales_but_never_enlarged():
    rng = np.random.default_rng(0)
    scales = [draw_scale(1024, rng) for _ in range(500)]
    assert max(scales) <= 1 and min(scales) < 0.3 and max(scales) > 0.95
    assert {draw_scale(100, rng) for _ in range(20)} == {1.0}


def test_rotation_keeps_the_size_and_mirrors_beyond_the_edges():
    plain = Image.new("RGB", (60, 60), (10, 200, 30))
    assert set(np.unique(np.asarray(rotate(plain, 30)).reshape(-1, 3), axis=0).ravel()) == {10, 200, 30}
    half = np.zeros((60, 60, 3), np.uint8)
    half[:30] = 255
    turned = np.asarray(rotate(Image.fromarray(half), 90))
    assert turned[30, 5].mean() > 250 and turned[30, 55].mean() < 5


# ---- pools


def test_a_pool_holds_tiles_and_degraded_versions(tmp_path):
    source = photographs(tmp_path / "a", 100, mode="plain")
    config = PoolConfig(count=20, tile=64, versions=2, mix=(("heavy", 4.0, 1.0),), jitter=0.0)
    made = make_pool([source], config, tmp_path / "pool", workers=0)
    assert made["hq"].shape == (20, 64, 64, 3) and made["lq"].shape == (20, 2, 64, 64, 3)
    assert np.array_equal(made["hq"][7], TileComposer([source], 64, 0)(7)[0])
    assert not np.array_equal(made["lq"][7, 0], made["lq"][7, 1])
    assert np.abs(made["lq"].astype(int).mean((1, 2, 3, 4)) - made["hq"].mean((1, 2, 3))).max() < 40


def test_the_rest_of_the_mix_is_not_degraded(tmp_path):
    source = photographs(tmp_path / "a", 100)
    config = PoolConfig(count=16, tile=64, versions=2, mix=(("heavy", 2.0, 0.5),))
    made = make_pool([source], config, tmp_path / "pool", workers=0)
    same = (made["lq"] == made["hq"][:, None]).all((2, 3, 4))
    assert 0.2 < same.mean() < 0.8


def test_an_original_and_its_versions_have_the_same_change_of_colours(tmp_path):
    source = photographs(tmp_path / "a", 100)
    config = PoolConfig(count=16, tile=64, versions=2, mix=(), jitter=1.0)
    made = make_pool([source], config, tmp_path / "pool", workers=0)
    plain = np.stack([TileComposer([source], 64, 0)(k)[0] for k in range(16)])
    changed = (made["hq"] != plain).any((1, 2, 3))
    assert changed.mean() > 0.3 and (made["lq"] == made["hq"][:, None]).all()


def test_sources_are_read_as_folders_with_weights(tmp_path):
    photographs(tmp_path / "a", 20)
    assert parse_source(f"{tmp_path / 'a'}=0.25").weight == 0.25
    assert parse_source(str(tmp_path / "a")).weight == 1.0
    for bad in ("0", "-1", "much"):
        with pytest.raises(ValueError, match="above 0"):
            parse_source(f"{tmp_path / 'a'}={bad}")
