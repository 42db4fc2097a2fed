import numpy as np
import pytest
import torch
from PIL import Image

from pfstorer_rt.training.views import FACE, ViewRange, draw_shifts, draw_view_maps, faces_in_views, sample_views

SIZE = 96
MARK = (60, 24)
"""Column and row of the marked pixels."""


def marked(size=SIZE):
    """A black image with a white square of 5 pixels, centred on `MARK` at size 96."""
    image, scale = np.zeros((size, size, 3), np.uint8), size // SIZE
    x, y = (scale * n for n in MARK)
    image[y - 2 * scale : y + 3 * scale, x - 2 * scale : x + 3 * scale] = 255
    return image


def by_pillow(image, matrix):
    """The view of a map in [-1, 1], computed by Pillow from the map in pixels."""
    to_unit = np.array([[2 / SIZE, 0, -1], [0, 2 / SIZE, -1], [0, 0, 1]])
    pixels = np.linalg.inv(to_unit) @ matrix @ to_unit
    data = tuple(pixels[:2].reshape(-1))
    return np.asarray(
        Image.fromarray(image).transform((SIZE, SIZE), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    )


def centre(image):
    """Column and row of the centre of the bright pixels."""
    weights = np.asarray(image, float).sum(-1)
    return np.array([(weights.sum(axis) * np.arange(SIZE)).sum() for axis in (0, 1)]) / weights.sum()


@pytest.mark.parametrize("seed", range(6))
def test_a_view_equals_pillows_affine_transform(seed):
    """Scaled, rotated, moved and half of them mirrored."""
    rng = np.random.default_rng(seed)
    maps = draw_view_maps(1, ViewRange(0.9, 1.2, rotated=1.0, shift=0.3), rng)
    photo = torch.from_numpy(marked()).permute(2, 0, 1)[None]
    view = sample_views(photo, maps, SIZE)[0].permute(1, 2, 0).numpy()
    expected = by_pillow(marked(), maps[0])
    assert expected.any()
    np.testing.assert_allclose(centre(view), centre(expected), atol=0.15)
    larger = torch.from_numpy(marked(2 * SIZE)).permute(2, 0, 1)[None]
    finer = sample_views(larger, maps, SIZE)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(centre(finer), centre(expected), atol=0.5)


def test_half_of_the_views_are_mirrored():
    maps = draw_view_maps(400, ViewRange(0.5, 1.5, rotated=0.3, shift=1.0), np.random.default_rng(0))
    signs = np.sign(np.linalg.det(maps))
    assert 150 < (signs < 0).sum() < 250
    scales = np.sqrt(np.abs(np.linalg.det(maps)))
    assert 0.5 <= scales.min() < 0.6 and 1.4 < scales.max() <= 1.5


@pytest.mark.parametrize("seed", range(4))
def test_the_position_of_a_face_follows_its_view(seed):
    """A mark at the corner of the face's square appears at the same corner of the square in the view."""
    maps = draw_view_maps(1, ViewRange(0.9, 1.2, rotated=1.0, shift=0.2), np.random.default_rng(seed))
    corner = FACE @ np.array([0.5, -0.5, 1.0])  # a point inside the square
    column, row = ((corner[:2] + 1) / 2 * SIZE).astype(int)
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[row - 1 : row + 2, column - 1 : column + 2] = 255
    found = (centre(by_pillow(image, maps[0])) + 0.5) / SIZE * 2 - 1
    expected = faces_in_views(maps)[0] @ np.array([0.5, -0.5, 1.0])
    np.testing.assert_allclose(found, expected, atol=2.2 / SIZE)


def test_shifts_keep_the_pixels():
    rng = np.random.default_rng(1)
    photo = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    mirrored = set()
    for _ in range(12):
        maps = draw_shifts(1, SIZE, rng)
        sign, (x, y) = maps[0, 0, 0], np.round(maps[0, :2, 2] * SIZE / 2).astype(int)
        view = sample_views(photo, maps, SIZE)[0]
        source = photo[0].flip(-1) if sign < 0 else photo[0]
        moved = torch.roll(source, (-int(y), -int(sign * x)), (1, 2)).float() / 255
        inner = (slice(None), slice(24, -24), slice(24, -24))
        torch.testing.assert_close(view[inner], moved[inner], atol=2e-3, rtol=0)
        mirrored.add(sign)
    assert mirrored == {-1, 1}
