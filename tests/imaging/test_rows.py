import os
import resource
import threading

import numpy as np
import pytest

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging.rows import BAND_BYTES, Spool, bands, from_pixels, read_ahead, read_pixels, to_pixels


@pytest.mark.parametrize("in_memory", [1 << 20, 0], ids=["memory", "file"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_rows_come_back_in_any_order(in_memory, dtype):
    levels = np.random.default_rng(0).integers(0, 256, (3, 23, 7)).astype(np.uint8)
    expected = levels / np.float32(255) * 2 - 1
    image = levels if dtype is np.uint8 else expected
    spool = Spool(23, 7, 3, dtype, in_memory)
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


def test_a_large_image_is_stored_in_a_temporary_file():
    before = open_files()
    small, large = Spool(64, 64), Spool(64, 64, in_memory=1000)
    assert open_files() == before + 1
    del large
    assert open_files() == before and small.height == 64


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_an_array_is_wrapped_without_a_copy():
    array = np.zeros((3, 2, 4), np.float32)
    spool = Spool.of(array)
    array[0, 1, 2] = 5
    assert (spool.height, spool.width, spool.channels) == (2, 4, 3) and spool.read(1, 2)[0, 0, 2] == 5


@pytest.fixture
def small_files():
    """The system refuses files of more than 4 KB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_is_reported_with_advice(small_files):
    spool = Spool(64, 64, in_memory=0)
    with pytest.raises(PFStorerError, match=r"temporary file of a large image.*too large.*TMPDIR"):
        spool.write(0, np.zeros((3, 64, 64)))


@pytest.mark.parametrize(("height", "width", "least"), [(1, 1, 1), (1000, 10_000, 1), (1000, 10_000, 256), (7, 9, 100)])
def test_bands_cover_all_rows_once(height, width, least):
    found = list(bands(height, width, 12, least))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(height))
    largest = max(stop - start for start, stop in found)
    assert largest <= least or largest * width * 12 <= BAND_BYTES
    assert all(stop - start >= min(least, height) for start, stop in found[:-1])


def test_bands_are_computed_by_several_threads_and_come_in_order():
    both = threading.Barrier(2, timeout=10)  # raises unless two bands are computed at the same time

    def read(start, stop):
        both.wait()
        return start, stop

    spans = [(n, n + 1) for n in range(8)]
    assert list(read_ahead(read, spans, threads=2)) == spans


def test_an_error_in_a_band_is_raised_and_the_other_bands_are_not_computed():
    seen = []

    def read(start, stop):
        seen.append(start)
        if start == 1:
            raise PFStorerError("damaged")
        return start

    with pytest.raises(PFStorerError, match="damaged"):
        list(read_ahead(read, [(n, n + 1) for n in range(100)], threads=1))
    assert len(seen) < 10


def test_several_threads_read_one_temporary_file():
    image = np.random.default_rng(0).random((3, 512, 64)).astype(np.float32)
    spool = Spool(512, 64, in_memory=0)
    spool.write(0, image)
    assert np.array_equal(np.concatenate(list(read_ahead(spool.read, [(n, n + 1) for n in range(512)], 4)), 1), image)


def test_an_unfinished_reader_is_freed_without_waiting_for_its_threads():
    resume = threading.Event()

    def read(start, stop):
        assert start == 0 or resume.wait(10)
        return start

    reading = read_ahead(read, [(n, n + 1) for n in range(8)], threads=1)
    assert next(reading) == 0
    freed = threading.Thread(target=reading.close)
    freed.start()
    freed.join(5)
    assert not freed.is_alive()
    resume.set()
