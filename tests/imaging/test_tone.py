import numpy as np
import pytest

from pfstorer_rt.imaging.rows import Spool, from_pixels, to_pixels
from pfstorer_rt.imaging.tone import SkinToned, Toned, fit_tone, in_skin_tones, reduced

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
    tone, deviation = fit_tone(source)
    assert deviation * 255 / 2 < 1.5
    toned = to_pixels(Toned(source, tone).read(0, 40))
    assert np.sqrt(np.mean((toned - sepia(grey)) ** 2)) * 255 < 1.5


def test_a_result_with_other_hues_gets_the_one_hue(grey, make_image):
    source = Spool.of(from_pixels(sepia(grey)))
    kept = in_skin_tones(source, reduced(source)).back
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


def test_a_colourful_image_keeps_its_colours(face):
    source = Spool.of(from_pixels(face))
    assert in_skin_tones(source, reduced(source)) is None


@pytest.mark.parametrize(("levels", "share"), [(2.2, 1.0), (3.1, 0.5), (7.0, 0.0)])
def test_the_tone_of_a_pale_image_is_moved_and_moved_back(grey, levels, share):
    noise = np.random.default_rng(0).normal(size=(*grey.shape, 3))
    noise -= (noise @ WEIGHTS)[..., None]
    noise *= levels / 255 / np.sqrt((noise**2).mean((0, 1)).max())
    pixels = (0.1 + 0.8 * grey[..., None] + noise).astype(np.float32)
    source = Spool.of(from_pixels(pixels))
    found = in_skin_tones(source, reduced(source))
    if not share:
        assert found is None
        return
    shown = to_pixels(found.rows.read(0, 40))
    assert np.abs(shown @ WEIGHTS - pixels @ WEIGHTS).max() < 2e-3, "the luma stays"
    whole = to_pixels(SkinToned(source).read(0, 40)) - (pixels @ WEIGHTS)[..., None]
    assert (shown - pixels).mean((0, 1)) == pytest.approx(share * whole.mean((0, 1)), abs=4e-3)
    assert np.abs(to_pixels(found.back(found.rows).read(0, 40)) - pixels).max() < 2e-3


def test_the_noise_of_a_scan_is_no_colour(make_image):
    grey = make_image(256, 200) @ WEIGHTS
    noise = np.random.default_rng(0).normal(0, 8 / 255, (256, 200, 3))
    source = Spool.of(from_pixels((0.2 + 0.6 * grey[..., None] + noise).clip(0, 1).astype(np.float32)))
    assert fit_tone(source)[1] * 255 / 2 > 5
    red, _, blue = in_skin_tones(source, reduced(source)).rows.read(0, 256) - source.read(0, 256)
    assert red.mean() > 0.1 and blue.mean() < -0.1


def test_a_tint_of_a_part_of_the_image_is_a_second_hue(grey):
    tinted = sepia(grey)
    tinted[:12, :12, 0] *= 0.7
    _, deviation = fit_tone(Spool.of(from_pixels(tinted)))
    assert deviation * 255 / 2 > 1.5
