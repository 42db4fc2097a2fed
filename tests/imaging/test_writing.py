import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, JpegImagePlugin
from sample_images import levels, one_line, sample, smooth

from pfstorer_rt.errors import PFStorerError
from pfstorer_rt.imaging import color
from pfstorer_rt.imaging import files as images
from pfstorer_rt.imaging.files import encode_image, load_image, save_image
from pfstorer_rt.imaging.metadata import Metadata

# ---- writing


@pytest.mark.parametrize("suffix", [".png", ".TIF", ".tiff", ".bmp"])
def test_lossless_round_trip(tmp_path, suffix):
    values = sample()
    save_image(tmp_path / f"a{suffix}", values / np.float32(255))
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"a{suffix}")), values)
    assert np.array_equal(levels(load_image(tmp_path / f"a{suffix}").pixels), values)


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP")])
def test_lossy_formats_keep_colours_and_follow_the_quality(tmp_path, suffix, kind):
    values = np.ascontiguousarray(images.from_tensor(smooth(40, 60)))
    sizes = []
    for quality in (30, 95):
        save_image(tmp_path / f"a{suffix}", values, quality=quality, overwrite=True)
        sizes.append((tmp_path / f"a{suffix}").stat().st_size)
    assert sizes[0] < sizes[1]
    image = Image.open(tmp_path / f"a{suffix}")
    assert image.format == kind
    assert np.abs(np.asarray(image) / 255 - values).mean() < 3 / 255  # WebP halves the chroma planes


def test_jpeg_has_no_chroma_subsampling():
    image = Image.open(io.BytesIO(encode_image(np.zeros((16, 16, 3)), "jpg")))
    assert JpegImagePlugin.get_sampling(image) == 0


def test_rounding_is_half_up_and_clamped():
    steps = np.array([0, 0.49, 0.5, 0.51, 1.5, 2.5, 254.49, 254.5, 255, 300, -7], np.float32)
    expected = [0, 0, 1, 1, 2, 3, 254, 255, 255, 255, 0]
    pixels = np.repeat((steps / np.float32(255))[None, :, None], 3, -1)
    assert np.asarray(Image.open(io.BytesIO(encode_image(pixels))))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_level_survives_every_float_type(dtype):
    values = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, -1)
    pixels = (values / 255).astype(dtype)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_image(pixels)))), values)


@pytest.mark.parametrize("format", ["png", "webp", "tif"])
def test_alpha_is_kept_where_the_format_has_it(format):
    values = sample(channels=4)
    data = encode_image(values[..., :3] / 255.0, format, alpha=values[..., 3] / 255.0)
    found = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(found[..., 3], values[..., 3])
    if format != "webp":
        assert np.array_equal(found, values)


@pytest.mark.parametrize("format", ["jpg", "bmp"])
def test_alpha_is_composited_over_white_in_other_formats(format):
    values = np.full((16, 16, 4), (200, 100, 0, 64), np.uint8)
    white = Image.new("RGBA", (16, 16), "white")
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(values)).convert("RGB"), int)
    data = encode_image(values[..., :3] / 255.0, format, alpha=values[..., 3] / 255.0)
    found = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
    assert np.abs(found - expected).max() <= (1 if format == "bmp" else 3)


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tif"])
def test_profile_and_exif_are_saved(format):
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 1, "Dorothea"
    exif[0x8769], exif[0x8825] = {0x9003: "1936:03:01 12:00:00"}, {1: "N"}
    data = encode_image(sample() / 255.0, format, metadata=Metadata(images.srgb_profile(), exif.tobytes()))
    image = Image.open(io.BytesIO(data))
    assert image.info["icc_profile"] == images.srgb_profile()
    assert image.getexif()[0x013B] == "Dorothea" and image.getexif()[0x0112] == 1
    assert image.getexif().get_ifd(0x8769) == {0x9003: "1936:03:01 12:00:00"}
    assert image.getexif().get_ifd(0x8825)[1] == "N"


def test_nothing_is_embedded_by_default():
    for format in ("png", "jpg", "webp"):
        info = Image.open(io.BytesIO(encode_image(sample() / 255.0, format))).info
        assert "icc_profile" not in info and "exif" not in info


def test_exif_too_long_for_jpeg_is_left_out():
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000
    data = encode_image(sample() / 255.0, "jpg", metadata=Metadata(exif=exif.tobytes()))
    assert not Image.open(io.BytesIO(data)).getexif()


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tif", "bmp"])
def test_bytes_are_the_same_in_another_process(format):
    code = (
        "import sys, numpy as np; from pfstorer_rt.imaging import files;"
        "pixels = np.linspace(0, 1, 540).reshape(12, 15, 3);"
        f"data = files.encode_image(pixels, {format!r}, metadata=files.Metadata(files.srgb_profile()));"
        "sys.stdout.buffer.write(data)"
    )
    pixels = np.linspace(0, 1, 540).reshape(12, 15, 3)
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    assert encode_image(pixels, format, metadata=Metadata(images.srgb_profile())) == other


def test_the_profile_contains_no_time():
    made = images.srgb_profile()
    assert made[24:36].hex() == "07d000010001000000000000"
    assert ImageCms.getProfileName(ImageCms.ImageCmsProfile(io.BytesIO(made))).startswith("sRGB")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    pixels = np.zeros((4, 4, 3), np.float32)
    pixels[1, 2, 0] = bad
    with pytest.raises(PFStorerError) as raised:
        save_image(tmp_path / "a.png", pixels)
    one_line(raised, "NaN", "a.png")
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_lists_the_known_ones(tmp_path):
    for name in ("a.gif", "a", "a.png.bak"):
        with pytest.raises(PFStorerError) as raised:
            save_image(tmp_path / name, np.zeros((2, 2, 3)))
        one_line(raised, ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def test_existing_file_needs_overwrite(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(PFStorerError) as raised:
        save_image(path, np.zeros((2, 2, 3)))
    one_line(raised, "allow overwriting", str(path))
    assert path.read_bytes() == b"precious"
    save_image(path, np.zeros((2, 2, 3)), overwrite=True)
    assert Image.open(path).size == (2, 2)


def test_a_full_disk_keeps_the_old_file(tmp_path, full_disk):
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(PFStorerError, match="no space left"):
        save_image(path, np.zeros((2, 2, 3)), overwrite=True)
    assert path.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 1


def test_unwritable_paths_are_reported(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "missing" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(PFStorerError) as raised:
            save_image(path, np.zeros((2, 2, 3)))
        one_line(raised, str(path), "cannot be written")


@pytest.mark.parametrize(("suffix", "side"), [(".webp", 16384), (".jpg", 65501)])
def test_images_too_large_for_a_format_are_refused(tmp_path, suffix, side):
    with pytest.raises(PFStorerError) as raised:
        save_image(tmp_path / f"a{suffix}", np.zeros((1, side, 3), np.float32))
    one_line(raised, str(side), "png")
    save_image(tmp_path / f"a{suffix}", np.zeros((1, side - 1, 3), np.float32))  # the limit is the real one


def test_invalid_arguments_raise_value_error():
    pixels = np.zeros((2, 2, 3))
    for call in (
        lambda: encode_image(pixels.astype(np.uint8)),
        lambda: encode_image(pixels[0]),
        lambda: encode_image(pixels[:0]),
        lambda: encode_image(pixels, alpha=np.zeros((2, 3))),
        lambda: encode_image(pixels, "gif"),
        lambda: encode_image(pixels, "jpg", quality=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


# ---- tensors


def test_tensors_are_planes_from_minus_one_to_one():
    pixels = sample().astype(np.float32) / 255
    tensor = images.to_tensor(pixels)
    assert tensor.shape == (1, 3, 6, 9) and tensor.dtype == torch.float32
    assert tensor[0, 1, 2, 3].item() == pytest.approx(float(pixels[2, 3, 1]) * 2 - 1)
    assert np.array_equal(levels(images.from_tensor(tensor)), sample())
    assert images.to_tensor(pixels[::-1, ::-1]).shape == (1, 3, 6, 9)  # negative strides


def test_from_tensor_clamps_and_keeps_nan():
    tensor = torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1).to(torch.bfloat16).requires_grad_()
    assert images.from_tensor(tensor).tolist() == [[[0, 0.5, 1]]]
    assert np.isnan(images.from_tensor(torch.full((1, 3, 1, 1), torch.nan))).all()
    with pytest.raises(ValueError, match="expected"):
        images.from_tensor(torch.zeros(2, 3, 4, 4))


def test_shrinking_agrees_with_pillow():
    x = torch.rand(1, 3, 47, 31, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    out = images.resize_bicubic(x, (20, 13), antialias=True)
    for c in range(3):
        expected = Image.fromarray(x[0, c].numpy()).resize((13, 20), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(out[0, c], np.asarray(expected).clip(-1, 1), atol=1e-5)


def test_enlarging_is_the_cubic_convolution_and_is_clamped():
    row = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    out = images.resize_bicubic(row.expand(1, 3, 6, 6), (12, 12))
    assert out.min() == -1 and out.max() == 1  # the kernel without clamping overshoots the step

    def kernel(d, a=-0.75):  # Keys 1981
        d = abs(d)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        return near if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    at = (5 + 0.5) / 2 - 0.5  # the place of output column 5, half-pixel centres
    expected = sum(row[k].item() * kernel(at - k) for k in range(6))
    assert out[0, 0, 6, 5].item() == pytest.approx(max(-1, expected), abs=1e-5)


def planes(height, width, seed=0):
    """(1, 3, height, width) in [-1, 1]."""
    return smooth(height, width, seed).numpy()


def test_adain_result_has_the_statistics_of_the_style():
    content, style = planes(20, 30, 1) * np.float32(0.5) + np.float32(0.1), planes(24, 12, 2)
    out = color.adain_color_fix(content, style)
    c, s = content.astype(np.float64), style.astype(np.float64)

    def statistics(a):
        std = np.sqrt(a.var(axis=(2, 3), ddof=1, keepdims=True) + 1e-5)
        return a.mean(axis=(2, 3), keepdims=True), std

    (cm, cs), (sm, ss) = statistics(c), statistics(s)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, (c - cm) / cs * ss + sm, atol=1e-5)


def test_adain_of_flat_and_single_pixel_images_is_finite():
    flat = np.full((3, 8, 8), 0.3, np.float32)
    np.testing.assert_allclose(color.adain_color_fix(flat, planes(8, 8)[0]).var(), 0, atol=0.2)
    one = color.adain_color_fix(np.zeros((3, 1, 1), np.float32), np.full((3, 1, 1), 0.5, np.float32))
    np.testing.assert_allclose(one, 0.5, atol=1e-6)


def wavelet_by_hand(content, style):
    """The published loop on one channel, with numpy's own padding."""

    def split(a):
        high = np.zeros_like(a)
        for i in range(5):
            r = 2**i
            p = np.pad(a, r, mode="edge")
            h, w = a.shape
            low = sum(
                ky * kx / 16 * p[dy * r : dy * r + h, dx * r : dx * r + w]
                for dy, ky in enumerate((1, 2, 1))
                for dx, kx in enumerate((1, 2, 1))
            )
            high, a = high + (a - low), low
        return high, a

    return split(content)[0] + split(style)[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (40, 33)])
def test_wavelet_agrees_with_the_published_loop_at_any_size(size):
    rng = np.random.default_rng(4)
    content, style = rng.uniform(-1, 1, (2, 2, 3, *size))
    out = color.wavelet_color_fix(content.astype(np.float32), style.astype(np.float32))
    assert out.dtype == np.float32
    for b in range(2):
        for c in range(3):
            expected = wavelet_by_hand(content[b, c], style[b, c])
            np.testing.assert_allclose(out[b, c], expected, atol=2e-6)


def test_color_fix_chooses_the_method_by_name():
    content, style = planes(9, 9, 1), planes(9, 9, 2)
    assert color.color_fix(content, style, "none") is content
    assert np.array_equal(color.color_fix(content, style, "adain"), color.adain_color_fix(content, style))
    assert np.array_equal(color.color_fix(content, style, "wavelet"), color.wavelet_color_fix(content, style))
    with pytest.raises(ValueError, match="adain, wavelet, none"):
        color.color_fix(content, style, "lab")
    with pytest.raises(ValueError, match="one shape"):
        color.wavelet_color_fix(content, style[..., :1])
