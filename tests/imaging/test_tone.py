import numpy as np
import pytest

from pfstorer_rt.imaging.rows import Spool, from_pixels, to_pixels
from pfstorer_rt.imaging.tone import SkinToned, Toned, find_tone, keep_hue

WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)


def sepia(grey):
    """Tone (H, W) in [0, 1]: dark red-brown to light yellow, rounded to 255 levels."""
    toned = np.stack([0.1 + 0.88 * grey, 0.05 + 0.9 * grey, 0.8 * grey**1.3], -1)
    return (toned * 255).round().astype(np.float32) / 255


@pytest.fixture
def grey(make_image):
    return make_image(40, 56) @ WEIGHTS


def test_the_tone_of_a_sepia_image_gives_the_image_back(grey):
    source = Spool.of(from_pixels(sepia(grey)))
    tone = find_tone(source)
    toned = to_pixels(Toned(source, tone).read(0, 40))
    assert np.sqrt(np.mean((toned - sepia(grey)) ** 2)) * 255 < 1.5


def test_a_result_with_other_hues_gets_the_one_hue(grey, make_image):
    kept = keep_hue(Spool.of(from_pixels(sepia(grey))))
    strange = make_image(40, 56, seed=3)
    toned = to_pixels(kept(Spool.of(from_pixels(strange))).read(0, 40))
    order = np.argsort(toned[..., 1].ravel())
    for channel in (0, 2):  # one hue: every channel is a rising function of another channel
        values = toned[..., channel].ravel()[order]
        assert (np.diff(values) > -2 / 255).all()
    assert np.abs(toned @ WEIGHTS - strange @ WEIGHTS).max() < 0.03  # its own light and dark


def test_skin_tones_have_the_luma_of_the_image(make_image):
    pixels = make_image(40, 56)
    pixels[:2], pixels[2:4] = 0.0, 1.0
    toned = to_pixels(SkinToned(Spool.of(from_pixels(pixels))).read(0, 40))
    assert np.abs(toned @ WEIGHTS - pixels @ WEIGHTS).max() < 1e-3
    assert np.abs(toned[:2]).max() < 1e-6 and np.abs(toned[2:4] - 1).max() < 1e-6, "black and white stay"
    red, green, blue = toned[4:].transpose(2, 0, 1)
    assert (red > green).all() and (green > blue).all()
    assert (red - blue).max() == pytest.approx(0.3325 * 32 / 27 / 2, abs=0.01), "at 2 / 3 of white"


def test_a_colour_image_has_no_tone(face):
    assert keep_hue(Spool.of(from_pixels(face))) is None


def test_a_tint_of_a_part_of_the_image_is_a_second_hue(grey):
    tinted = sepia(grey)
    tinted[:12, :12, 0] *= 0.7
    assert find_tone(Spool.of(from_pixels(tinted))) is None
