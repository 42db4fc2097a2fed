"""Conversion from colour profiles to sRGB."""

import numpy as np
import pytest
from colour_profiles import SRGB_XYZ, cmyk_profile, gamma_curve, grey_profile, matrix_profile, matrix_srgb_profile
from PIL import Image
from sample_images import levels, sample, stream
from skimage.color import lab2rgb

from pfstorer_rt.imaging import files as images
from pfstorer_rt.imaging.files import load_image


def test_profile_is_converted_to_srgb_by_the_formula():
    # sRGB's own primaries under gamma 1: the conversion is the sRGB curve (IEC 61966-2-1) and nothing else.
    values = sample(16, 16)
    linear = values / 255
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    image = Image.fromarray(values)
    read = load_image(stream(image, "PNG", icc_profile=matrix_profile(SRGB_XYZ, gamma_curve(1.0))))
    # lcms computes 8-bit curves with 8-bit results: half a level of rounding, one of its own.
    np.testing.assert_allclose(read.pixels, expected, atol=1.6 / 255)
    assert read.metadata.icc == images.srgb_profile() and read.notes == ()


def test_wide_gamut_primaries_are_converted():
    # Red and green swapped: a profile that no gamma can imitate.
    swapped = matrix_profile((SRGB_XYZ[1], SRGB_XYZ[0], SRGB_XYZ[2]), gamma_curve(2.2))
    read = load_image(stream(Image.new("RGB", (2, 2), (200, 30, 90)), "PNG", icc_profile=swapped))
    red, green, blue = levels(read.pixels)[0, 0].astype(int)
    assert abs(green - 200) < 6 and abs(red - 30) < 12 and abs(blue - 90) < 6


def test_srgb_profiles_change_nothing():
    values = sample(64, 64)
    for profile in (images.srgb_profile(), matrix_srgb_profile()):
        read = load_image(stream(Image.fromarray(values), "PNG", icc_profile=profile))
        assert np.array_equal(levels(read.pixels), values) and read.metadata.icc == images.srgb_profile()


def test_grey_with_a_grey_profile_at_8_and_16_bits():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    linear = ramp[0] / 65535
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    eight = Image.fromarray((ramp // 257).astype(np.uint8))
    for image in (eight, Image.fromarray(ramp)):
        read = load_image(stream(image, "PNG", icc_profile=grey_profile(1.0)))
        np.testing.assert_allclose(read.pixels[0, :, 1], expected, atol=1.6 / 255)
        assert read.metadata.icc is not None
    # Between two 8-bit levels a 16-bit file has values of its own.
    fine = Image.fromarray(np.array([[25700, 25800, 25900, 25957]], np.uint16))
    read = load_image(stream(fine, "PNG", icc_profile=grey_profile(1.0)))
    assert (np.diff(read.pixels[0, :, 0]) > 0).all()


def test_cmyk_with_a_profile_is_converted_by_it():
    # Lab 8-bit encoding: L = 255/100, a and b offset by 128; skimage gives the sRGB value.
    lab = (153, 168, 108)
    expected = lab2rgb([[[lab[0] * 100 / 255, lab[1] - 128, lab[2] - 128]]])
    image = Image.new("CMYK", (3, 2), (10, 20, 30, 0))
    read = load_image(stream(image, "TIFF", icc_profile=cmyk_profile(lab)))
    assert read.metadata.icc is not None and read.notes == ()
    # From D50 to D65, lcms adapts by Bradford, and skimage's relative Lab by XYZ scaling: close, not equal.
    np.testing.assert_allclose(read.pixels[0, 0], expected[0, 0], atol=0.03)
    assert np.ptp(read.pixels, axis=(0, 1)).max() == 0


@pytest.mark.parametrize("profile", [b"not a profile", cmyk_profile((128, 128, 128)), grey_profile(1.0)])
def test_unusable_profiles_are_ignored_with_a_note(profile):
    values = sample()
    read = load_image(stream(Image.fromarray(values), "PNG", icc_profile=profile))
    assert np.array_equal(levels(read.pixels), values)
    assert read.metadata.icc is None and "colour profile ignored" in read.notes[0] and "\n" not in read.notes[0]


def test_lab_tiff():
    image = Image.fromarray(np.full((2, 2, 3), (153, 0, 0), np.uint8), "LAB")
    red, green, blue = levels(load_image(stream(image, "TIFF")).pixels)[0, 0].astype(int)
    # L* = 60 is Y = 0.2812, which sRGB encodes as 145
    assert max(red, green, blue) - min(red, green, blue) <= 1 and abs(red - 145) <= 2
