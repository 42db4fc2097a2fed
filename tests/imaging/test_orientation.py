"""Orientation and other EXIF data of images."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from sample_images import levels, sample, stream

from pfstorer_rt.imaging import files as images
from pfstorer_rt.imaging.files import load_image
from pfstorer_rt.imaging.rows import bands


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once_and_reset(orientation, kind):
    # The eight cases of EXIF 2.3, table of tag 274, as what a viewer must do with the stored rows.
    upright = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: np.rot90,
    }[orientation]
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = (250, 0, 0)
    stored[:8, 16:] = (0, 250, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x013B] = "Dorothea"
    read = load_image(stream(Image.fromarray(stored), kind, exif=exif, quality=100))
    assert read.pixels.shape == upright(stored).shape
    centre = (slice(2, None, 4), slice(2, None, 4))  # away from the block borders that lossy codecs smear
    assert np.abs(levels(read.pixels)[centre].astype(int) - upright(stored)[centre].astype(int)).max() < 90
    kept = Image.Exif()
    kept.load(read.metadata.exif)
    assert kept[0x0112] == 1 and kept[0x013B] == "Dorothea"


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_exif_keeps_camera_and_place_but_not_the_old_size_or_layout(kind):
    exif = Image.Exif()
    exif[0x0110] = "Leica"
    exif.get_ifd(0x8769).update({0x9003: "1936:03:01 12:00:00", 0xA002: 9, 0xA003: 6})
    exif.get_ifd(0x8825).update({1: "N"})
    for directory in (0x8769, 0x8825):
        exif[directory] = exif.get_ifd(directory)
    read = load_image(stream(Image.fromarray(sample()), kind, exif=exif))
    kept = Image.Exif()
    kept.load(read.metadata.exif)
    assert kept.get_ifd(0x8769) == {0x9003: "1936:03:01 12:00:00"}
    assert kept.get_ifd(0x8825)[1] == "N"
    assert set(kept) == {0x0110, 0x0112, 0x8769, 0x8825}  # none of TIFF's strip offsets


def test_an_image_with_damaged_exif_is_read_with_a_note():
    values = sample()
    read = load_image(stream(Image.fromarray(values), "PNG", exif=b"Exif\0\0XX*\0nonsense"))
    assert np.array_equal(levels(read.pixels), values)
    assert read.metadata.exif is None and "EXIF" in read.notes[0]


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_rotated_image_is_read_by_rows(turn):
    values = np.random.default_rng(turn).integers(0, 256, (700, 600, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = io.BytesIO()
    Image.fromarray(values).save(data, "TIFF", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(data)))
    data.seek(0)
    assert images.image_size(data) == expected.shape[:2]
    scan = images.scan_image(data)
    assert len(list(bands(*expected.shape[:2]))) > 1
    assert np.array_equal(np.round(scan.pixels.pixels(0, scan.pixels.height) * 255), expected[..., :3])
    assert np.array_equal(np.round(255 * scan.alpha.pixels(0, scan.alpha.height)), expected[..., 3:])


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_exif_does_not_know_is_ignored(tmp_path, value):
    stored = Image.fromarray(sample(6, 9))
    stored.save(tmp_path / "a.png")
    plain = load_image(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = value
    stored.save(tmp_path / "b.png", exif=exif)
    turned = load_image(tmp_path / "b.png")
    assert np.array_equal(plain.pixels, turned.pixels) and images.image_size(tmp_path / "b.png") == (6, 9)
