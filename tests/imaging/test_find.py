"""Listing image files."""

import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.errors import BadFileError, SettingError
from pfstorer_rt.imaging.files import encode_image
from pfstorer_rt.imaging.find import find_images, list_images, without_results
from pfstorer_rt.imaging.metadata import Metadata


def test_photographs_are_found_in_folders_below_and_sorted(tmp_path):
    names = ["b.JPG", "a.png", "sub/deeper/c.webp", "sub/d.tiff"]
    for name in [*names, "notes.txt", "sub/e.cr2", ".hidden.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    expected = sorted(tmp_path / name for name in names)
    assert find_images([tmp_path]) == expected
    assert find_images([tmp_path / "sub", tmp_path, tmp_path / "a.png"]) == expected, "each once"
    assert find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"], "what is named is taken"


def test_nothing_found_is_an_error_with_what_was_expected(tmp_path):
    with pytest.raises(BadFileError, match=r"no images in .*expected files such as \.jpg"):
        find_images([tmp_path])
    with pytest.raises(BadFileError, match=r"x\.png: no such file"):
        find_images([tmp_path / "x.png"])


def test_one_path_is_enough_and_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    assert find_images(tmp_path) == find_images(str(tmp_path)) == [tmp_path / "a.png"]
    monkeypatch.chdir(tmp_path)
    for sources in ("", ["a.png", ""]):
        with pytest.raises(SettingError, match="an empty name"):
            find_images(sources)


def test_sub_folders_can_be_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.jpg", "notes.txt", "sub/c.png"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_images(tmp_path, recursive=False)] == ["a.jpg", "b.png"]
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.png", "c.png"]


def test_every_suffix_of_a_readable_format_is_found(tmp_path):
    suffixes = (".jfif", ".jpe", ".avif", ".heic", ".HIF", ".jp2", ".pgm", ".dib", ".apng", ".j2c", ".mpo")
    names = sorted(f"a{suffix}" for suffix in suffixes)
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_images(tmp_path)] == names


def test_hidden_and_system_files_are_skipped_silently(tmp_path):
    hidden = ["._a.jpg", ".b.png", ".Trashes/c.png", "@eaDir/a.jpg/thumb.jpg", "#recycle/d.png", "__MACOSX/e.png"]
    for name in ["a.jpg", "sub/b.png", "#1/c.png", *hidden]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    notes = []
    found = list_images(tmp_path, note=notes.append)
    assert sorted(str(path.relative_to(tmp_path)) for path in found) == ["#1/c.png", "a.jpg", "sub/b.png"]
    assert notes == []


def test_images_that_are_not_read_are_named_in_one_line(tmp_path):
    for name in ("a.jpg", "b.CR2", "c.psd", "d.nef", "e.svg", "f.pcd", "notes.txt", "clip.mov"):
        (tmp_path / name).write_bytes(b"x")
    notes = []
    assert [path.name for path in find_images([tmp_path], notes.append)] == ["a.jpg"]
    (note,) = notes
    assert note.startswith("5 image(s)") and "b.CR2, c.psd, d.nef and 2 more" in note and "convert" in note


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP"])
def test_images_without_an_extension_are_named_in_one_line(tmp_path, kind):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "scan", format=kind)
    (tmp_path / "README").write_text("text")
    (tmp_path / "empty").touch()
    notes = []
    assert list_images(tmp_path, note=notes.append) == [tmp_path / "a.png"]
    assert notes == ["1 image(s) without a file extension were passed over: scan; add one, such as .jpg"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    notes = []
    assert len(list_images(tmp_path, note=notes.append)) == 1
    assert len(notes) == 1 and "locked" in notes[0] and "permissions" in notes[0]


def test_a_link_to_itself_and_a_pipe_are_no_images(tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert list_images(tmp_path) == []


def test_links_that_are_passed_over_are_named(tmp_path):
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "good.png").symlink_to(tmp_path / "a.png")
    notes = []
    assert [path.name for path in list_images(tmp_path, note=notes.append)] == ["a.png", "good.png"]
    folders, files = notes
    assert folders.startswith("1 link(s) to folders") and "up; name these folders" in folders
    assert files.startswith("1 link(s) to missing files") and files.endswith("lost.jpg")


def test_a_glob_pattern_names_its_images(tmp_path):
    for name in ("a.png", "b.jpg", "notes.txt", "raw.nef"):
        (tmp_path / name).write_bytes(b"x")
    notes = []
    assert [path.name for path in find_images([tmp_path / "*"], notes.append)] == ["a.png", "b.jpg"]
    assert "raw.nef" in notes[0]
    (tmp_path / "[x].png").write_bytes(b"x")
    assert [path.name for path in find_images([tmp_path / "[x].png"])] == ["[x].png"], "a file of this name"
    with pytest.raises(BadFileError, match="no images in"):
        find_images([tmp_path / "*.tif"])


def test_a_pipe_among_the_inputs_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(b"x")
    waiting = threading.Timer(5, lambda: os.close(os.open(tmp_path / "pipe.png", os.O_WRONLY)))  # ends a wait
    waiting.start()
    before = time.monotonic()
    paths = [tmp_path / "a.png", tmp_path / "pipe.png"]
    assert without_results(paths, print) == paths and time.monotonic() - before < 4
    waiting.cancel()


def test_results_are_recognized_by_their_name_and_their_mark(tmp_path):
    plain = encode_image(np.zeros((8, 8, 3)), "jpg")
    marked = encode_image(np.zeros((8, 8, 3)), "jpg", metadata=Metadata().marked())
    files = {"a.jpg": plain, "b.jpg": marked, "a_restored.jpg": plain, "a_restored_compare.jpg": plain, "d.jpg": b"x"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    notes = []
    left = without_results(find_images([tmp_path]), notes.append)
    assert [path.name for path in left] == ["a.jpg", "d.jpg"]
    assert len(notes) == 1 and "and 2 more: left out, because they are results of this program" in notes[0]
    with pytest.raises(BadFileError, match="original photographs"):
        without_results([tmp_path / "b.jpg"], notes.append)
