import errno
import os

import numpy as np
import pytest

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging import rows as spools
from pfstorer_rt.imaging.rows import Spool, bands


@pytest.fixture(params=["memory", "file"])
def place(request, monkeypatch):
    if request.param == "file":
        monkeypatch.setattr(spools, "IN_MEMORY", 0)
    return request.param


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_rows_come_back_in_any_order(place, dtype):
    rows = np.random.default_rng(0).integers(0, 256, (23, 7, 3)).astype(dtype)
    spool = Spool(23, 7, 3, dtype)
    for start in (10, 0, 20):
        spool.write(start, rows[start : start + 10])
    expected = rows / np.float32(255) if dtype is np.uint8 else rows
    for start, stop in ((0, 23), (5, 6), (19, 22)):
        found = spool.read(start, stop)
        assert found.dtype == np.float32 and np.array_equal(found, expected[start:stop])
        assert np.array_equal(spool.stored(start, stop), rows[start:stop])


def test_a_large_picture_is_not_in_memory(place):
    spool = Spool(64, 64)
    assert (spool._file is None) == (place == "memory") and (spool._array is None) == (place == "file")


def test_an_array_is_wrapped_without_a_copy():
    array = np.zeros((2, 3, 3), np.float32)
    spool = Spool.of(array)
    array[1, 2, 0] = 5
    assert (spool.height, spool.width) == (2, 3) and spool.read(1, 2)[0, 2, 0] == 5


def test_a_full_disk_says_where_and_what_to_do(monkeypatch):
    monkeypatch.setattr(spools, "IN_MEMORY", 0)

    class Full:
        def seek(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

    monkeypatch.setattr(spools.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(PFStorerError, match=r"no space left.*TMPDIR"):
        Spool(4, 4).write(0, np.zeros((1, 4, 3)))


@pytest.mark.parametrize(("height", "width", "least"), [(1, 1, 1), (1000, 10_000, 1), (1000, 10_000, 256), (7, 9, 100)])
def test_bands_cover_all_rows_once(height, width, least):
    found = list(bands(height, width, 12, least))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(height))
    largest = max(stop - start for start, stop in found)
    assert largest <= least or largest * width * 12 <= spools.BAND_BYTES
    assert all(stop - start >= min(least, height) for start, stop in found[:-1])
