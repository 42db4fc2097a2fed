"""Images of several frames, and formats of phones and archives."""

import io
import sys

import numpy as np
import pytest
from PIL import Image
from sample_images import levels, sample, stream

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.imaging.files import load_image


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
