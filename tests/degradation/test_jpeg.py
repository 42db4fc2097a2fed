import math

import pytest
import torch

from pfstorer_rt.degradation.degrade import jpeg
from pfstorer_rt.degradation.jpeg import jpeg_batch


def distance(a, b):
    """The root mean square difference in levels of 8 bits."""
    return 255 * math.sqrt(float(((a - b) ** 2).mean()))


def test_the_result_is_close_to_libjpegs(face):
    """Pillow's codec rounds at other places, so single values differ by more than one level."""
    for quality in (10, 30, 45, 50, 75, 95, 100):
        expected = jpeg(face, quality)
        result = jpeg_batch(face[None], [quality])[0]
        assert distance(result, expected) < 1.5 < distance(expected, face), quality
        assert float((result - expected).abs().mean()) * 255 < 0.7, quality


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (15, 33), (37, 51)])
def test_sizes_that_are_not_multiples_of_16_are_padded(face, size):
    part = face[:, 60 : 60 + size[0], 60 : 60 + size[1]]
    result = jpeg_batch(part[None], [75])[0]
    assert result.shape == part.shape
    assert distance(result, jpeg(part, 75)) < 2


def test_every_image_has_its_own_quality(face):
    qualities = [20, 90, 60]
    batch = jpeg_batch(torch.stack([face, face.flip(2), face.flip(1)]), qualities)
    for image, result, quality in zip((face, face.flip(2), face.flip(1)), batch, qualities, strict=True):
        assert torch.equal(result, jpeg_batch(image[None], [quality])[0])


def test_the_result_has_whole_levels_of_8_bits(face):
    levels = 255 * jpeg_batch(face[None] * 1.2 - 0.1, [80])
    assert float((levels - levels.round()).abs().max()) < 1e-3
    assert levels.min() >= 0 and levels.max() <= 255


def test_images_are_rounded_to_8_bits_before(face):
    between = face * 0.97
    assert torch.equal(jpeg_batch(between[None], [95]), jpeg_batch((between[None] * 255).round() / 255, [95]))


@pytest.mark.parametrize("qualities", [[0], [101], [], [50, 50]])
def test_invalid_qualities_are_refused(qualities):
    with pytest.raises(ValueError, match="give 1 numbers from 1 to 100, one per image"):
        jpeg_batch(torch.zeros(1, 3, 8, 8), qualities)
