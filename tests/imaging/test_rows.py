import errno
import os

import numpy as np
import pytest

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging import rows as spools
from pfstorer_rt.imaging.rows import Spool, bands, from_pixels, read_pixels, to_pixels


@pytest.fixture(params=["memory", "file"])
def place(request, monkeypatch):
    if request.param == "file":
        monkeypatch.setattr(spools, "IN_MEMORY", 0)
    return request.param


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_rows_come_back_in_any_order(place, dtype):
    levels = np.random.default_rng(0).integers(0, 256, (3, 23, 7)).astype(np.uint8)
    expected = levels / np.float32(255) * 2 - 1
    image = levels if dtype is np.uint8 else expected
    spool = Spool(23, 7, 3, dtype)
    for start in (10, 0, 20):
        spool.write(start, image[:, start : start + 10])
    for start, stop in ((0, 23), (5, 6), (19, 22)):
        found, pixels = spool.read(start, stop), spool.pixels(start, stop)
        assert found.dtype == np.float32 and np.array_equal(found, expected[:, start:stop])
        assert pixels.dtype == np.float32 and pixels.shape == (stop - start, 7, 3)
        assert np.array_equal(np.round(pixels * 255), levels[:, start:stop].transpose(1, 2, 0))


def test_levels_are_read_as_exact_255ths():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 256)
    assert np.array_equal(read_pixels(Spool.of(levels), 0, 1)[0, :, 0], np.arange(256, dtype=np.float32) / 255)


def test_pixels_become_a_band_and_back():
    pixels = np.random.default_rng(0).random((4, 5, 3)).astype(np.float32)
    band = from_pixels(pixels)
    assert band.shape == (3, 4, 5) and band.dtype == np.float32
    assert band[1, 2, 3] == pixels[2, 3, 1] * 2 - 1
    np.testing.assert_allclose(to_pixels(band), pixels, rtol=0, atol=1e-7)
    assert to_pixels(np.float32([[[-3, 3, np.nan]]])).tolist()[0][:2] == [[0], [1]]
    assert np.isnan(to_pixels(np.float32([[[np.nan]]]))).all()


def test_a_large_image_is_not_in_memory(place):
    spool = Spool(64, 64)
    assert (spool._file is None) == (place == "memory") and (spool._array is None) == (place == "file")


def test_an_array_is_wrapped_without_a_copy():
    array = np.zeros((3, 2, 4), np.float32)
    spool = Spool.of(array)
    array[0, 1, 2] = 5
    assert (spool.height, spool.width, spool.channels) == (2, 4, 3) and spool.read(1, 2)[0, 0, 2] == 5


def test_a_full_disk_is_reported_with_advice(monkeypatch):
    monkeypatch.setattr(spools, "IN_MEMORY", 0)

    class Full:
        def seek(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

    monkeypatch.setattr(spools.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(PFStorerError, match=r"no space left.*TMPDIR"):
        Spool(4, 4).write(0, np.zeros((3, 1, 4)))


@pytest.mark.parametrize(("height", "width", "least"), [(1, 1, 1), (1000, 10_000, 1), (1000, 10_000, 256), (7, 9, 100)])
def test_bands_cover_all_rows_once(height, width, least):
    found = list(bands(height, width, 12, least))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(height))
    largest = max(stop - start for start, stop in found)
    assert largest <= least or largest * width * 12 <= spools.BAND_BYTES
    assert all(stop - start >= min(least, height) for start, stop in found[:-1])
