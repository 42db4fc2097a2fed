"""Listing image files."""

import pytest

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.imaging.find import find_images, list_images


def test_photographs_are_found_in_folders_below_and_sorted(tmp_path):
    names = ["b.JPG", "a.png", "sub/deeper/c.webp", "sub/d.tiff"]
    for name in [*names, "notes.txt", "sub/e.heic", ".hidden.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    expected = sorted(tmp_path / name for name in names)
    assert find_images([tmp_path]) == expected
    assert find_images([tmp_path / "sub", tmp_path, tmp_path / "a.png"]) == expected, "each once"
    assert find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"], "what is named is taken"


def test_nothing_found_is_an_error_with_what_was_expected(tmp_path):
    with pytest.raises(BadFileError, match=r"no images in .*expected \.png"):
        find_images([tmp_path])
    with pytest.raises(BadFileError, match=r"x\.png: no such file"):
        find_images([tmp_path / "x.png"])


def test_sub_folders_can_be_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.jpg", "notes.txt", "sub/c.png"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_images(tmp_path, recursive=False)] == ["a.jpg", "b.png"]
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.png", "c.png"]
