from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pfstorer_rt.config import RestoreConfig
from pfstorer_rt.imaging.rows import Spool, from_pixels, read_whole, to_pixels
from pfstorer_rt.imaging.tone import ONE_HUE, fit_tone
from pfstorer_rt.models import scratches as models
from pfstorer_rt.runtime import scratches
from pfstorer_rt.runtime.scratches import MARGIN, MULTIPLE, TILE, find_damage, shipped_network, without_scratches

CONFIG = RestoreConfig(steps=2, sampler="ddpm")


def rows(pixels):
    return Spool.of(from_pixels(pixels))


@pytest.fixture(scope="module")
def portrait():
    """A generated face, (512, 512, 3) in [0, 1]."""
    file = files("pfstorer_rt") / "demo_images" / "original.jpg"
    return np.asarray(Image.open(str(file)).convert("RGB"), np.float32) / 255


@pytest.fixture(scope="module")
def scratched(portrait):
    """The face with lines and spots; and a map (H, W) of them."""
    image = Image.fromarray((portrait * 255).round().astype(np.uint8))
    marks = Image.new("L", image.size)
    for canvas, color in ((image, (240, 236, 225)), (marks, 255)):
        draw = ImageDraw.Draw(canvas)
        draw.line([(60, 0), (200, 250), (190, 511)], color, 3)
        draw.line([(0, 330), (511, 290)], color, 2)
        for x, y in ((100, 100), (300, 180), (330, 400), (420, 60)):
            draw.ellipse([x, y, x + 6, y + 5], color)
    return np.asarray(image, np.float32) / 255, np.asarray(marks) > 0


def bright(image):
    """Take bright pixels for damage, and fill them with the coordinates of the tile's pixels."""
    opacity = (image.mean(1, keepdims=True) > 0.9).astype(np.float32)
    return opacity, -image


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 700), (384, 385), (900, 130)])
def test_tiles_give_what_the_whole_image_gives(height, width):
    image = np.random.default_rng(0).uniform(-1, 1, (3, height, width)).astype(np.float32)
    image[:, :: max(1, height // 7), :: max(1, width // 9)] = 1
    opacity, fill = find_damage(image, bright)
    assert np.array_equal(fill, -image) and np.array_equal(opacity[0], (image.mean(0) > 0.9).astype(np.float32))


@pytest.mark.parametrize(("height", "width"), [(1000, 40), (512, 513), (17, 1)])
def test_the_network_gets_tiles_of_valid_sizes_and_only_their_inner_part_is_used(height, width):
    sizes = set()

    def marked(image):
        sizes.add(image.shape[2:])
        near = np.zeros_like(image[:, :1])
        near[..., : MARGIN // 2, :] = near[..., -MARGIN // 2 :, :] = 1  # as at the edge of a tile
        return near, image

    opacity, _ = find_damage(np.zeros((3, height, width), np.float32), marked)
    assert all(side % MULTIPLE == 0 and side <= TILE for size in sizes for side in size)
    assert opacity.shape == (1, height, width) and opacity[:, MARGIN:-MARGIN].sum() == 0


def test_the_network_of_the_training_takes_these_sizes():
    assert MULTIPLE == models.MULTIPLE
    image = torch.zeros(1, 3, MULTIPLE, 3 * MULTIPLE)
    opacity, fill = shipped_network()(image.numpy())
    assert opacity.shape == (1, 1, MULTIPLE, 3 * MULTIPLE) and fill.shape == image.shape


@pytest.mark.parametrize(("given", "expected"), [(0.1, 0.0), (0.25, 0.0), (0.425, 0.5), (0.6, 1.0), (0.9, 1.0)])
def test_an_uncertain_pixel_stays(given, expected):
    def find(image):
        return np.full_like(image[:, :1], given), -image

    opacity, _ = find_damage(np.zeros((3, 8, 8), np.float32), find)
    assert np.allclose(opacity, expected, atol=1e-6)


def test_an_image_without_damage_is_the_same_object(portrait):
    source = rows(portrait)
    assert without_scratches(source, lambda image: (image[:, :1] * 0, image)) is source


def test_damaged_pixels_are_replaced_and_others_stay():
    image = np.full((40, 50, 3), 0.25, np.float32)
    image[10, 20] = 1.0
    found = to_pixels(read_whole(without_scratches(rows(image), bright)))
    assert np.allclose(found[10, 20], 0.0)  # `bright` fills with the negative
    image[10, 20] = found[10, 20]
    assert np.allclose(found, image, atol=1e-6)


def test_a_large_image_is_searched_at_a_reduced_size(monkeypatch):
    monkeypatch.setattr(scratches, "LONGEST", 100)
    image = np.full((400, 200, 3), 0.25, np.float32)
    image[80:160, 40:120] = 1.0
    found = to_pixels(read_whole(without_scratches(rows(image), bright)))
    assert found.shape == image.shape
    assert np.abs(found[100:140, 60:100]).max() < 0.05 and np.abs(found[200:] - 0.25).max() < 1e-6


def test_a_grey_image_stays_grey(portrait):
    def coloured(image):
        fill = image.copy()
        fill[:, 0] += 0.3
        return np.ones_like(image[:, :1]), fill

    grey = np.repeat(portrait[:100, :100, :1], 3, -1)
    found = read_whole(without_scratches(rows(grey), coloured))
    assert np.ptp(found, axis=0).max() == 0
    assert np.ptp(read_whole(without_scratches(rows(portrait[:100, :100]), coloured)), axis=0).max() > 0.2


def test_a_sepia_image_keeps_its_hue(portrait):
    def half_coloured(image):
        opacity, fill = np.zeros_like(image[:, :1]), image.copy()
        opacity[..., ::2, :] = 1
        fill[:, 0] += 0.3
        return opacity, fill

    sepia = portrait[:100, :100, :1] * np.float32([1.0, 0.9, 0.7])
    found = without_scratches(rows(sepia), half_coloured)
    assert fit_tone(found)[1] <= ONE_HUE < fit_tone(without_scratches(rows(portrait[:100, :100]), half_coloured))[1]
    assert np.abs(read_whole(found) - from_pixels(sepia))[:, ::2].max() > 0.02


def test_the_shipped_network_removes_scratches(portrait, scratched):
    image, marks = scratched
    found = to_pixels(read_whole(without_scratches(rows(image))))
    before, after = (np.abs(pixels - portrait).mean(-1) for pixels in (image, found))
    assert after[marks].mean() < 0.25 * before[marks].mean()
    assert after[~marks].mean() < 0.004


def test_the_shipped_network_leaves_an_undamaged_face(portrait):
    found = to_pixels(read_whole(without_scratches(rows(portrait))))
    assert (np.abs(found - portrait).max(-1) > 0.05).mean() < 0.003


def test_the_shipped_network_is_opened_once():
    assert shipped_network() is shipped_network()


def test_a_restorer_removes_scratches_on_demand(restorer, scratched):
    image = np.ascontiguousarray(scratched[0][100:190, 60:200])
    clean = to_pixels(read_whole(without_scratches(rows(image))))
    wanted = restorer.restore(image, replace(CONFIG, remove_scratches=True))
    assert np.abs(wanted - restorer.restore(clean, CONFIG)).max() < 1e-5
    assert np.abs(wanted - restorer.restore(image, CONFIG)).max() > 0.02
