"""What the networks see of dark, faded, grey and tinted images."""

import numpy as np
import pytest

from pfstorer_rt.imaging.rows import Spool, from_pixels, to_pixels
from pfstorer_rt.imaging.shown import Levels, shown_to_networks, span_of
from pfstorer_rt.imaging.tone import reduced

WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)


def rows_of(pixels):
    return Spool.of(from_pixels(np.ascontiguousarray(pixels, np.float32)))


def pixels_of(rows):
    return to_pixels(rows.read(0, rows.height))


@pytest.fixture
def full(face):
    """A colour photograph from black to white."""
    low, high = face.min(), face.max()
    return (face - low) / (high - low)


def test_levels_are_moved(full):
    assert pixels_of(Levels(rows_of(0.2 + 0.4 * full), 2.5, -1 + 2.5 * 0.6)) == pytest.approx(full, abs=1e-5)


def test_an_image_with_contrast_and_colours_is_shown_as_it_is(full):
    source = rows_of(full)
    shown = shown_to_networks(source)
    assert shown.rows is source and shown.back(source) is source and shown.again(source) is source


@pytest.mark.parametrize(("gain", "offset"), [(0.35, 0.0), (0.4, 0.4), (0.45, 0.55), (0.5, 0.2)])
def test_a_flat_image_gets_full_contrast_and_its_result_does_not(full, gain, offset):
    pixels = gain * full + offset
    shown = shown_to_networks(rows_of(pixels))
    luma = pixels_of(shown.rows) @ WEIGHTS
    assert (luma.min(), luma.max()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))
    inside = np.abs(pixels_of(shown.rows) - 0.5) < 0.49
    back = pixels_of(shown.back(shown.rows))
    assert np.abs(back - pixels)[inside].max() < 1e-4
    flat = shown.back(rows_of(np.full_like(full, 1.0)))
    assert pixels_of(flat).max() == pytest.approx((pixels @ WEIGHTS).max(), abs=0.02), "white is the old maximum"


def test_a_flat_grey_image_gets_contrast_and_skin_tones(full):
    grey = np.repeat(0.3 + 0.4 * (full @ WEIGHTS)[..., None], 3, 2)
    shown = shown_to_networks(rows_of(grey))
    seen = pixels_of(shown.rows)
    assert seen.max() - seen.min() > 0.9 and (seen[..., 0] - seen[..., 2]).mean() > 0.05
    back = pixels_of(shown.back(shown.rows))
    assert np.ptp(back, axis=-1).max() < 1e-6 and np.abs(back - grey).max() < 2e-3
    assert np.abs(pixels_of(shown.again(rows_of(grey))) @ WEIGHTS - grey[..., 0]).max() < 1e-3


def test_noise_is_no_contrast():
    rng = np.random.default_rng(0)
    pixels = 0.5 + 0.1 * np.linspace(-1, 1, 256)[:, None, None] + 0.12 * rng.standard_normal((256, 256, 1))
    source = rows_of(np.repeat(pixels.clip(0, 1), 3, 2))
    low, high = span_of(source, reduced(source))
    assert (high - low) / 2 < 0.7 < np.ptp(pixels.clip(0, 1))


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_blank_image_gets_no_contrast(noise):
    page = 0.6 + noise * np.random.default_rng(0).random((20, 30, 1))
    shown = pixels_of(shown_to_networks(rows_of(np.repeat(page, 3, 2))).rows)
    assert np.abs(shown @ WEIGHTS - page[..., 0]).max() < 1e-3


TINTS = {"warm": (1.0, 0.8, 0.6), "blue": (0.65, 0.87, 1.0), "green": (0.8, 1.0, 0.75), "sunset": (1.0, 0.4, 0.1)}


@pytest.mark.parametrize("tint", TINTS)
def test_a_tinted_image_is_shown_with_a_weaker_tint_and_gets_it_back(full, tint):
    pixels = 0.98 * full * np.array(TINTS[tint], np.float32)
    shown = shown_to_networks(rows_of(pixels))
    seen = pixels_of(shown.rows)

    def strength(image):
        white = np.quantile(image, 0.98, axis=(0, 1))
        return np.log(white.max() / white.min())

    assert 0.3 * strength(pixels) < strength(seen) < 0.75 * strength(pixels)
    inside = (seen < 0.999).all(-1)
    assert inside.mean() > 0.9 and np.abs(pixels_of(shown.back(shown.rows)) - pixels)[inside].max() < 1e-3
    factors = np.median(seen[inside] / np.maximum(pixels[inside], 1e-3), axis=0)
    assert factors.max() < 1.51, "noise is not amplified"


def test_a_faded_and_tinted_image_gets_contrast_and_a_weaker_tint(full):
    pixels = 0.3 + 0.45 * full * np.array([1.1, 0.95, 0.7], np.float32)
    shown = shown_to_networks(rows_of(pixels))
    seen = pixels_of(shown.rows)
    luma = seen @ WEIGHTS
    assert luma.max() - luma.min() > 0.9
    back = pixels_of(shown.back(shown.rows))
    inside = ((seen > 0.001) & (seen < 0.999)).all(-1)
    assert inside.mean() > 0.7 and np.abs(back - pixels)[inside].max() < 1e-3


def test_an_image_of_many_colours_has_no_tint():
    """The whites of its channels are at different places, so the brightest luma is darker than each of them."""
    source = rows_of(np.random.default_rng(0).random((64, 64, 3)))
    assert shown_to_networks(source).rows is source
