import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from sample_images import levels, one_line, sample, stream
from skimage.color import lab2rgb

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.imaging import files as images
from pfstorer_rt.imaging.files import load_image, save_image
from pfstorer_rt.imaging.metadata import Metadata
from pfstorer_rt.imaging.rows import bands

# ---- reading


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


# ---- colour profiles


# Small profiles in the layout of ICC.1:2001-04, so that the expected colours follow from a formula.

D50 = (0.9642, 1, 0.8249)


def s15(*values):
    return b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def gamma_curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def matrix_profile(primaries, curve):
    tags = {
        name: b"XYZ \0\0\0\0" + s15(*column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    tags.update(dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))
    return assemble(b"RGB ", tags)


def grey_profile(gamma):
    return assemble(b"GRAY", {b"kTRC": gamma_curve(gamma)})


def cmyk_profile(value):
    """A CMYK profile with one 8-bit Lab value for all colours without K, and black for full K."""
    identity = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + identity * 4
    table += (bytes(value) + b"\0\x80\x80") * 8 + identity * 3
    return assemble(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ")


def assemble(space, tags, kind=b"mntr", connection=b"XYZ "):
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(81)
    white = b"XYZ \0\0\0\0" + s15(*D50)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": white, **tags}
    directory, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        directory += name + struct.pack(">II", at + len(body), len(data))
        body += data
    total = at + len(body)
    date = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    head = struct.pack(">I", total) + bytes(4) + b"\x02\x10\0\0" + kind + space + connection + date + b"acsp"
    head += bytes(28) + s15(*D50)
    return head.ljust(128, b"\0") + directory + body


# Red, green, blue, adapted to D50 by Bradford (Lindbloom's table).
SRGB_XYZ = ((0.43607, 0.22250, 0.01393), (0.38506, 0.71688, 0.09710), (0.14308, 0.06062, 0.71417))


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


def matrix_srgb_profile():
    """sRGB as another maker rounds it: the curve as 1024 samples."""
    x = np.linspace(0, 1, 1024)
    curve = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    table = b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.rint(curve * 65535).astype(">u2").tobytes()
    return matrix_profile(SRGB_XYZ, table)


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


# ---- animations


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several_is_read_and_noted(kind):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    first, *rest = [Image.new("RGB", (16, 12), colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    read = load_image(stream(first, kind, save_all=True, append_images=rest, **options))
    assert (levels(read.pixels) == (250, 0, 0)).all()
    assert read.frames == 3 and "3 frames: the first was used" in read.notes


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_damaged_later_frames_do_not_hide_the_first(kind):
    frames = [Image.fromarray(sample(20, 20, seed=k)).quantize() for k in range(4)]
    data = stream(frames[0], kind, save_all=True, append_images=frames[1:]).getvalue()
    for kept in range(len(data) // 2, len(data), 29):
        read = load_image(io.BytesIO(data[:kept]))
        assert np.array_equal(levels(read.pixels), np.asarray(frames[0].convert("RGB")))


# ---- what cannot be read


def test_missing_empty_folder_and_foreign_files(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello " * 100)
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    cases = {
        "missing.png": ("no such file",),
        "empty.png": ("empty", "0 bytes"),
        ".": ("folder", "expected an image file"),
        "text.jpg": ("not a readable image", "expected PNG"),
        "drawing.eps": ("not a readable image",),
        "text.jpg/a.png": ("cannot be opened",),
        "nul\0.png": ("cannot be opened",),
    }
    for name, words in cases.items():
        with pytest.raises(BadFileError) as raised:
            load_image(tmp_path / name)
        one_line(raised, *words)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_every_truncation_is_a_clear_error(kind):
    image = Image.fromarray(sample(40, 40))
    data = stream(image, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {})).getvalue()
    for kept in (1, 3, 10, 30, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(BadFileError) as raised:
            load_image(io.BytesIO(data[:kept]))
        one_line(raised, "the input stream", "copy it again")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_random_damage_is_read_or_refused_but_never_crashes(kind):
    data = bytearray(stream(Image.fromarray(sample(24, 24)), kind).getvalue())
    rng = np.random.default_rng(3)
    for _ in range(40):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 6):
            broken[at] = rng.integers(256)
        try:
            assert load_image(io.BytesIO(broken), max_pixels=10**6).pixels.ndim == 3
        except BadFileError as error:
            assert "\n" not in str(error)


def test_too_many_pixels_is_refused_before_decoding():
    data = stream(Image.new("L", (300, 200)), "PNG").getvalue()
    assert load_image(io.BytesIO(data), max_pixels=60000).pixels.shape == (200, 300, 3)
    with pytest.raises(BadFileError) as raised:
        load_image(io.BytesIO(data[:60]), max_pixels=59999)  # the pixels are not even there
    one_line(raised, "300 x 200", "59999", "raise the limit")


def test_pillows_pixel_limit_is_not_used(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = stream(Image.new("L", (30, 20)), "PNG")
    assert load_image(data).pixels.shape == (20, 30, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_file_without_read_permission_is_refused(tmp_path, unprivileged):
    with pytest.raises(BadFileError) as raised:
        load_image(tmp_path / "a.png")
    one_line(raised, "Permission denied", "a.png")


def test_a_pipe_is_read_to_its_end():
    values = sample()
    data = stream(Image.fromarray(values), "PNG").getvalue()
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as end:
        end.write(data)
    with os.fdopen(reading, "rb") as source:
        assert np.array_equal(levels(load_image(source).pixels), values)


# ---- reading and writing


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


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_rotated_image_is_read_by_rows(turn):
    values = np.random.default_rng(turn).integers(0, 256, (700, 600, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = io.BytesIO()
    Image.fromarray(values).save(data, "TIFF", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(data)))
    scan = images.scan_image(data)
    assert len(list(bands(*expected.shape[:2]))) > 1
    assert np.array_equal(np.round(scan.pixels.pixels(0, scan.pixels.height) * 255), expected[..., :3])
    assert np.array_equal(np.round(255 * scan.alpha.pixels(0, scan.alpha.height)), expected[..., 3:])


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


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_jpeg_without_its_last_bytes_is_read_with_a_note(cut):
    values = np.ascontiguousarray(
        np.repeat(np.linspace(0, 255, 80, dtype=np.uint8)[:, None, None], 3, -1).repeat(64, 1)
    )
    data = stream(Image.fromarray(values), "JPEG", quality=95).getvalue()
    read, whole = load_image(io.BytesIO(data[:-cut])), load_image(io.BytesIO(data))
    assert len(read.notes) == 1 and "cut off at its end" in read.notes[0] and whole.notes == ()
    assert np.array_equal(read.pixels[:60], whole.pixels[:60])


def test_a_jpeg_with_a_missing_part_gets_a_note_and_half_a_jpeg_is_refused():
    values = sample(640, 64)
    data = stream(Image.fromarray(values), "JPEG", quality=95).getvalue()
    read = load_image(io.BytesIO(data[: int(len(data) * 0.96)]))
    (missing,) = [int(word) for word in read.notes[0].split() if word.isdecimal()][:1]
    assert 10 < missing < 40 and "of 640 rows are missing" in read.notes[0]
    grey = np.rint(read.pixels[640 - missing :] * 255)
    assert np.abs(grey - 128).max() <= 1
    with pytest.raises(BadFileError, match=r"3\d\d of 640 rows"):
        load_image(io.BytesIO(data[: len(data) // 2]))


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


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "HEIF"])
def test_formats_of_phones_and_archives_are_read(tmp_path, kind):
    from pillow_heif import register_heif_opener

    register_heif_opener()
    values = np.ascontiguousarray(np.asarray(Image.linear_gradient("L").resize((48, 32)).convert("RGB")))
    Image.fromarray(values).save(tmp_path / "a", kind, quality=95)
    assert np.abs(levels(load_image(tmp_path / "a").pixels).astype(int) - values.astype(int)).mean() < 4


def test_heic_without_its_extra_names_the_extra(tmp_path, monkeypatch):
    from pfstorer_rt.imaging import formats

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.readable.cache_clear()
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40)
    with pytest.raises(BadFileError, match=r"pip install 'pfstorer-rt\[heif\]'"):
        load_image(tmp_path / "a.heic")
    assert ".heic" not in formats.image_suffixes() and formats.is_unread_image(tmp_path / "a.HEIC")
    formats.readable.cache_clear()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadFileError, match="a pipe or a device"):
        load_image(tmp_path / "pipe.jpg")
    with pytest.raises(BadFileError, match="a pipe or a device"):
        load_image("/dev/zero")
