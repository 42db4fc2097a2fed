"""Reading images of all kinds exactly."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from colour_profiles import SRGB_XYZ, gamma_curve, matrix_profile
from PIL import Image, ImageOps
from sample_images import levels, one_line, sample, stream

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.imaging import files as images
from pfstorer_rt.imaging.files import load_image, save_image
from pfstorer_rt.imaging.metadata import Metadata


def test_importing_the_module_does_not_import_torch():
    code = "import pfstorer_rt.imaging.files, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("size", [(1, 1), (3, 5000), (6, 9)])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_is_read_exactly(tmp_path, size, kind):
    values = sample(*size)
    Image.fromarray(values).save(tmp_path / "a", kind)
    read = load_image(tmp_path / "a")
    assert np.array_equal(levels(read.pixels), values)
    assert (read.alpha, read.metadata, read.frames, read.notes) == (None, Metadata(dpi=read.metadata.dpi), 1, ())


def test_grey_and_grey_alpha():
    grey = sample(channels=2)
    read = load_image(stream(Image.fromarray(grey[..., 0]), "PNG"))
    assert np.array_equal(levels(read.pixels), np.repeat(grey[..., :1], 3, -1)) and read.alpha is None
    read = load_image(stream(Image.fromarray(grey, "LA"), "PNG"))
    assert np.array_equal(levels(read.pixels), np.repeat(grey[..., :1], 3, -1))
    assert np.array_equal(levels(read.alpha), grey[..., 1])


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)])
def test_16_bit_grey_keeps_its_depth(kind, dtype):
    values = np.array([[0, 1, 128, 255, 256], [257, 32767, 40000, 65534, 65535]], dtype)
    pixels = load_image(stream(Image.fromarray(values), kind)).pixels
    assert pixels.shape == (2, 5, 3) and (pixels == pixels[..., :1]).all()
    np.testing.assert_allclose(pixels[..., 0], values / 65535, atol=1e-7)  # far below a step of 1.5e-5


def test_16_bit_colour_is_read_as_8_bits_with_a_note():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + np.array([[65535, 0, 32896], [257, 514, 771]], ">u2").tobytes()
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")
    read = load_image(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))
    assert np.allclose(read.pixels * 255, [[[255, 0, 128], [1, 2, 3]]], rtol=0, atol=1e-3)
    assert read.notes == ("more than 8 bits a channel: results have 8",)


def test_16_bit_grey_with_one_transparent_value():
    values = np.array([[0, 4660, 65535]], np.uint16)
    plain = stream(Image.fromarray(values), "PNG").getvalue()
    # Pillow writes no tRNS for this mode: insert one before IDAT (PNG specification, 11.3.2.1).
    body = b"tRNS" + struct.pack(">H", 4660)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    at = plain.index(b"IDAT") - 4
    read = load_image(io.BytesIO(plain[:at] + chunk + plain[at:]))
    assert read.alpha.tolist() == [[1, 0, 1]]


def test_float_grey_outside_0_to_1_is_refused():
    values = np.array([[0, 0.25, 1]], np.float32)
    np.testing.assert_allclose(load_image(stream(Image.fromarray(values), "TIFF")).pixels[..., 1], values)
    with pytest.raises(BadFileError) as raised:
        load_image(stream(Image.fromarray(values * 200), "TIFF"))
    one_line(raised, "0 to 200", "expected 0 to 1")


@pytest.mark.filterwarnings("error")  # Pillow warns of palettes that are converted carelessly
def test_palette_without_and_with_transparency():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    index = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    read = load_image(stream(image, "PNG"))
    assert np.array_equal(levels(read.pixels), colours[index]) and read.alpha is None
    read = load_image(stream(image, "PNG", transparency=bytes([255, 128, 0])))
    assert np.array_equal(levels(read.pixels), colours[index])
    assert np.array_equal(levels(read.alpha), np.array([255, 128, 0], np.uint8)[index])
    read = load_image(stream(image, "GIF", transparency=1))
    assert np.array_equal(levels(read.alpha), np.where(index == 1, 0, 255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_read_beside_untouched_colours(kind):
    values = sample(channels=4)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    read = load_image(stream(Image.fromarray(values), kind, **options))
    assert np.array_equal(levels(read.pixels), values[..., :3])
    assert np.array_equal(levels(read.alpha), values[..., 3])


def test_rgb_with_a_transparent_colour():
    values = np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)
    read = load_image(stream(Image.fromarray(values), "PNG", transparency=(1, 2, 3)))
    assert np.array_equal(levels(read.pixels), values) and read.alpha.tolist() == [[1, 0]]


def test_cmyk_without_a_profile_is_converted_by_formula_with_a_note():
    values = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    read = load_image(stream(Image.fromarray(values, "CMYK"), "TIFF"))
    assert levels(read.pixels).tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]
    assert "CMYK" in read.notes[0] and read.metadata.icc is None


def test_cmyk_jpeg_is_not_inverted():
    read = load_image(stream(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"))
    assert read.pixels.min() > 0.95


def test_a_pipe_is_read_to_its_end():
    values = sample()
    data = stream(Image.fromarray(values), "PNG").getvalue()
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as end:
        end.write(data)
    with os.fdopen(reading, "rb") as source:
        assert np.array_equal(levels(load_image(source).pixels), values)


def test_read_and_write_again_changes_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "Leica"
    source = tmp_path / "a.png"
    Image.fromarray(sample(channels=4)).save(source, exif=exif, icc_profile=matrix_profile(SRGB_XYZ, gamma_curve(1.8)))
    once = load_image(source)
    save_image(tmp_path / "b.png", once.pixels, alpha=once.alpha, metadata=once.metadata)
    twice = load_image(tmp_path / "b.png")
    assert np.array_equal(once.pixels, twice.pixels) and np.array_equal(once.alpha, twice.alpha)
    assert once.metadata == twice.metadata
    assert Image.open(tmp_path / "b.png").size == ImageOps.exif_transpose(Image.open(source)).size


def test_the_size_is_known_without_decoding(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: data.index(b"IDAT") + 4])  # not a pixel in it
    assert images.image_size(tmp_path / "a.png") == (40, 24)
    with pytest.raises(BadFileError, match="raise the limit") as refusal:
        images.image_size(tmp_path / "a.png", 100)
    assert refusal.value.setting == "max_pixels"


@pytest.mark.parametrize("width", [720, 540])  # 2160 and 1620 bytes a row
def test_8_bit_images_have_no_note_on_deeper_channels(width):
    assert load_image(stream(Image.new("RGB", (width, 2)), "BMP")).notes == ()


def test_a_file_of_12_bit_values_in_16_bits_gets_a_note(tmp_path):
    values = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "scan.tif")
    assert any("brightest value is 6.2% of white" in note for note in load_image(tmp_path / "scan.tif").notes)
    Image.fromarray(values * 16).save(tmp_path / "whole.tif")
    assert not any("brightest" in note for note in load_image(tmp_path / "whole.tif").notes)
