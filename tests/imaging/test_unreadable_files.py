"""Files that are damaged, too large or not readable."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sample_images import one_line, sample, stream

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.imaging import files
from pfstorer_rt.imaging.files import load_image


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


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadFileError, match="a pipe or a device"):
        load_image(tmp_path / "pipe.jpg")
    with pytest.raises(BadFileError, match="a pipe or a device"):
        load_image("/dev/zero")


def test_the_reason_of_pillow_is_part_of_the_message(tmp_path):
    """Pillow refuses a PNG with more than 1 MB of text in one piece."""
    text = PngInfo()
    text.add_text("Comment", "x" * 2_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "text.png", pnginfo=text)
    with pytest.raises(BadFileError, match=r"not a readable image \(.*[Tt]oo large.*\); expected PNG"):
        load_image(tmp_path / "text.png")


class Endless(io.RawIOBase):
    """A stream such as /dev/zero in a pipe."""

    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def test_a_stream_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(files, "LARGEST_STREAM", 3 << 20)
    with pytest.raises(BadFileError, match=r"input stream: more than 3 MB; expected an image"):
        load_image(Endless())
    picture = stream(Image.fromarray(sample(9, 9)), "PNG").getvalue()
    assert files.read_stream(io.BytesIO(picture)).getvalue() == picture
