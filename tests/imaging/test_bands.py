import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging.bands import Canvas, ColorFixed, Cropped, Padded, Resized, Result, taps
from pfstorer_rt.imaging.color import color_fix
from pfstorer_rt.imaging.files import resize_bicubic
from pfstorer_rt.imaging.rows import TALL, Spool, bands
from pfstorer_rt.tiling import Tile


class Whole:
    """Rows of an array (3, H, W) that record which of them are read."""

    def __init__(self, image):
        self.image, self.height, self.width = image, image.shape[-2], image.shape[-1]
        self.reads = []

    def read(self, start, stop):
        assert 0 <= start < stop <= self.height
        self.reads.append((start, stop))
        return self.image[:, start:stop]


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.9, 0.9, (3, height, width)).astype(np.float32)


def tensor(image):
    return torch.from_numpy(image)[None]


def read_by(source, rows):
    return np.concatenate([source.read(y, min(source.height, y + rows)) for y in range(0, source.height, rows)], 1)


def pillow_lanczos(image, size):
    channels = [Image.fromarray(channel).resize(size[::-1], Image.Resampling.LANCZOS) for channel in image]
    return np.stack(channels).clip(-1, 1)


@pytest.mark.parametrize("size", [(50, 31), (21, 13), (75, 40), (200, 90), (5, 3), (1, 1)])
@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_by_rows_equals_resizing_the_whole_image(size, antialias):
    image = noise(50, 31)
    expected = pillow_lanczos(image, size) if antialias else resize_bicubic(tensor(image), size)[0].numpy()
    for rows in (1, 7, 1000):
        found = read_by(Resized(Whole(image), *size, antialias), rows)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # its positions are fp32


def test_resizing_reads_only_the_needed_rows():
    source = Whole(noise(1000, 4))
    Resized(source, 2000, 8, False).read(1000, 1010)
    ((start, stop),) = source.reads
    assert 490 <= start <= 499 and 505 <= stop <= 515


def test_an_image_of_the_target_size_is_not_changed():
    image = noise(9, 9)
    assert np.shares_memory(Resized(Whole(image), 9, 9, False).read(2, 5), image)


def test_taps_add_up_to_one():
    for antialias in (False, True):
        _, weights = taps(100, 37, 0, 37, antialias)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize(("height", "width", "bottom", "right"), [(40, 30, 24, 2), (40, 30, 0, 5), (40, 30, 7, 0)])
def test_padding_by_rows_is_reflection(height, width, bottom, right):
    image = noise(height, width)
    padded = Padded(Whole(image), Canvas(height, width, bottom, right, 1, 1))
    expected = F.pad(tensor(image), (0, right, 0, bottom), mode="reflect")[0].numpy()
    for rows in (1, 9, 64):
        assert np.array_equal(read_by(padded, rows), expected)
    assert np.array_equal(padded.read(height - 3, height + bottom), expected[:, height - 3 :])


def test_small_images_are_padded_with_their_edge():
    padded = Padded(Whole(noise(4, 30)), Canvas(4, 30, 28, 2, 1, 1))
    expected = F.pad(tensor(noise(4, 30)), (0, 2, 0, 28), mode="replicate")[0].numpy()
    assert np.array_equal(read_by(padded, 5), expected)


def test_a_crop_reads_its_rectangle():
    assert np.array_equal(Cropped(Whole(noise(9, 8)), Tile(2, 3, 5, 4)).read(1, 3), noise(9, 8)[:, 3:5, 3:7])


@pytest.mark.parametrize("kind", ["adain", "wavelet", "none"])
def test_colour_fix_by_rows_equals_the_whole_image(kind):
    content, style = noise(1000, 500, 1), noise(1000, 500, 2) * np.float32(0.5) + np.float32(0.2)
    assert len(list(bands(1000, 500, least=TALL))) > 1
    expected = color_fix(content, style, kind).clip(-1, 1)
    for rows in (300, 1000):
        found = read_by(ColorFixed(Whole(content), Whole(style), kind), rows)
        # The same sums over fewer rows at a time round differently.
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


def test_statistics_are_computed_once():
    content = Whole(noise(30, 5))
    read_by(ColorFixed(content, Whole(noise(30, 5)), "adain"), 10)
    assert content.reads == [(0, 30), (0, 10), (10, 20), (20, 30)]


def test_a_result_is_cropped_and_resized():
    image = noise(40, 30)
    result = Result(Whole(image), Canvas(36, 28, 4, 2, 18, 14), "bad")
    expected = pillow_lanczos(image[:, :36, :28].copy(), (18, 14))
    np.testing.assert_allclose(result.read(3, 9), expected[:, 3:9], atol=2e-6)


def test_values_that_are_not_finite_are_refused_where_they_are_read():
    spool = Spool(8, 4)
    spool.write(6, np.full((3, 1, 4), np.nan, np.float32))
    result = Result(spool, Canvas(8, 4, 0, 0, 8, 4), "not finite, try another")
    assert result.read(0, 6).shape == (3, 6, 4)
    with pytest.raises(PFStorerError, match="try another"):
        result.read(5, 8)


def test_grey_is_found_within_a_level_and_kept_as_luma():
    from pfstorer_rt.imaging.bands import Grey, is_grey
    from pfstorer_rt.imaging.rows import Spool

    rng = np.random.default_rng(0)
    levels = rng.integers(0, 250, (1, 300, 20), dtype=np.uint8).repeat(3, 0)
    assert is_grey(Spool.of(levels))
    levels[2, 250, 10] += 1
    assert is_grey(Spool.of(levels)), "rounding of a JPEG"
    levels[2, 250, 10] += 1
    assert not is_grey(Spool.of(levels))
    coloured = rng.uniform(-1, 1, (3, 8, 6)).astype(np.float32)
    grey = Grey(Spool.of(coloured)).read(2, 7)
    expected = np.asarray(0.299 * coloured[0] + 0.587 * coloured[1] + 0.114 * coloured[2])[2:7]
    assert grey.shape == (3, 5, 6) and all(np.allclose(channel, expected, atol=1e-6) for channel in grey)
