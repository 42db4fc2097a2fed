"""Turned images against NumPy's rotation of the whole image."""

import numpy as np
import pytest

from pfstorer_rt.imaging import rows as rows_module
from pfstorer_rt.imaging.rows import Spool, read_whole
from pfstorer_rt.imaging.turned import turned


@pytest.mark.parametrize("turns", [-3, -2, -1, 0, 1, 2, 3, 5])
@pytest.mark.parametrize("in_memory", [True, False])
def test_an_image_is_turned_clockwise(turns, in_memory, monkeypatch):
    monkeypatch.setattr(rows_module, "BAND_BYTES", 12 * 9 * 4)  # several bands
    if not in_memory:
        monkeypatch.setattr(Spool.__init__, "__defaults__", (3, np.float32, 0))
    image = np.random.default_rng(0).uniform(-1, 1, (3, 11, 9)).astype(np.float32)
    found = turned(Spool.of(image), turns)
    expected = np.rot90(image, -turns, (1, 2))
    assert (found.height, found.width) == expected.shape[1:]
    np.testing.assert_array_equal(read_whole(found), expected)
    np.testing.assert_array_equal(found.read(2, 5), expected[:, 2:5])


def test_a_turn_and_its_inverse_give_the_image_again():
    image = np.random.default_rng(1).uniform(-1, 1, (3, 4, 7)).astype(np.float32)
    for turns in range(4):
        np.testing.assert_array_equal(read_whole(turned(turned(Spool.of(image), turns), -turns)), image)
