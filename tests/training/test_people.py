import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.errors import SettingError
from pfstorer_rt.training.people import MIX, find_people, make_people_pool, place
from pfstorer_rt.training.tile_pool import PoolConfig


@pytest.fixture
def folder(tmp_path, make_image):
    """Three people with two photographs each; every person and photograph has its own colour."""
    for person in range(3):
        (tmp_path / "people" / f"person{person}").mkdir(parents=True)
        for photo in range(2):
            pixels = make_image(96, 96, seed=photo) * 0.2 + np.array([person, photo, 1 - photo]) * 0.25
            Image.fromarray((pixels * 255).astype(np.uint8)).save(
                tmp_path / "people" / f"person{person}" / f"{photo}.png"
            )
    return tmp_path / "people"


def test_people_are_the_folders_of_a_folder(folder):
    people = find_people([folder])
    assert [[path.name for path in photos] for photos in people] == [["0.png", "1.png"]] * 3


def test_people_with_one_photograph_are_refused(folder):
    (folder / "person1" / "0.png").unlink()
    with pytest.raises(SettingError, match=r"person1: one photograph, expected at least 2"):
        find_people([folder])
    with pytest.raises(SettingError, match="no people found"):
        find_people([folder / "person0"])


def test_every_tile_shows_the_photograph_that_its_numbers_name(folder, tmp_path):
    config = PoolConfig(count=12, tile=64, versions=2, mix=MIX)
    pool = make_people_pool(find_people([folder]), config, tmp_path / "pool", workers=0)
    assert pool["hq"].shape == (12, 64, 64, 3) and pool["lq"].shape == (12, 2, 64, 64, 3)
    assert pool["person"].tolist() == [0, 0, 1, 1, 2, 2] * 2 and pool["photo"].tolist() == [0, 1] * 6
    red, green = (pool["hq"][..., channel].mean((1, 2)) for channel in range(2))
    by_person = [red[pool["person"] == person].mean() for person in range(3)]
    assert by_person[0] + 30 < by_person[1] < by_person[2] - 30
    assert green[pool["photo"] == 0].max() + 30 < green[pool["photo"] == 1].min()
    assert np.isnan(pool["maps"]).all(), "no face in these images"


def test_a_pool_is_made_once(folder, tmp_path):
    config = PoolConfig(count=6, tile=64, versions=1, mix=MIX)
    first = {k: np.array(v) for k, v in make_people_pool(find_people([folder]), config, tmp_path / "a", 0).items()}
    again = make_people_pool(find_people([folder]), config, tmp_path / "b", 0)
    assert all(np.array_equal(first[name], again[name], equal_nan=name == "maps") for name in first)


@pytest.mark.parametrize("size", [(64, 64), (90, 120), (40, 70)])
def test_a_tile_is_filled_with_the_photograph(size):
    """A tile of a red photograph is red everywhere, because its surroundings are mirrored."""
    inner = Image.new("RGB", size, (200, 30, 30))
    for seed in range(12):
        tile = place(inner, 64, np.random.default_rng(seed))
        assert tile.shape == (64, 64, 3) and np.abs(tile.astype(int) - (200, 30, 30)).max() <= 1
