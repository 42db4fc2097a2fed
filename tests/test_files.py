import errno
import hashlib
import os
import stat
import sys
import zipfile
from functools import partial
from types import SimpleNamespace

import pytest

from pfstorer_rt import files
from pfstorer_rt.errors import BadFileError, ExistsError, PFStorerError


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def one_line(raised):
    text = str(raised.value)
    assert text and "\n" not in text
    return text


def test_writes_all_bytes_and_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "a.bin"
    with files.atomic_write(target) as handle:
        handle.write(b"new")
        assert not target.exists()  # the name appears only with all of the bytes
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_any_exception_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), files.atomic_write(target) as handle:
        handle.write(b"half of the n")
        raise error
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def fill_disk(handle):
    """Connect an open file to Linux's /dev/full, where every write fails as on a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, handle.fileno())
    os.close(full)


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["at the final flush", "during a write"])
def test_a_full_disk_is_reported_in_one_line_and_leaves_no_file(tmp_path, size):
    target = tmp_path / "a.bin"
    with pytest.raises(PFStorerError) as raised, files.atomic_write(target) as handle:
        fill_disk(handle)
        handle.write(bytes(size))
    text = one_line(raised)
    assert str(target) in text and "no space left" in text and "free some space" in text
    assert names(tmp_path) == []


def test_a_full_disk_is_reported_where_a_library_replaces_the_error(tmp_path):
    import torch

    with pytest.raises(PFStorerError, match="no space left"), files.atomic_write(tmp_path / "a.pt") as handle:
        fill_disk(handle)
        torch.save({"a": torch.zeros(50_000)}, handle)
    with pytest.raises(ValueError, match="a defect"), files.atomic_write(tmp_path / "b.bin"):
        raise ValueError("a defect")
    assert names(tmp_path) == []


def test_a_full_disk_in_a_work_folder_is_reported(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path))
    words = r"work: cannot be written \(no space left on device\); free some space"
    with pytest.raises(PFStorerError, match=words), files.work_folder():
        np.zeros(50_000).tofile("/dev/full")
    with pytest.raises(OSError, match="truncated"), files.work_folder():
        raise OSError("image file is truncated")


def test_a_full_disk_behind_standard_output_is_reported(monkeypatch):
    for number, error, words in (
        (errno.ENOSPC, PFStorerError, r"standard output: cannot be written \(no space left on device\)"),
        (errno.EPIPE, BrokenPipeError, "Broken pipe"),
    ):
        stream = SimpleNamespace(write=lambda data: None, flush=partial(fail, number))
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=stream))
        with pytest.raises(error, match=words):
            files.write_to_stdout(b"x")


def fail(number):
    raise OSError(number, os.strerror(number))


def test_a_failed_fsync_is_reported(tmp_path, full_disk):
    with pytest.raises(PFStorerError, match="no space left"), files.atomic_write(tmp_path / "a.bin") as handle:
        handle.write(b"x")
    assert names(tmp_path) == []


def test_a_failed_rename_is_reported(tmp_path):
    target = tmp_path / "a.bin"
    with pytest.raises(PFStorerError, match="it is a folder") as raised, files.atomic_write(target) as handle:
        handle.write(b"x")
        target.mkdir()  # by another process
    assert str(target) in one_line(raised)
    assert names(tmp_path) == ["a.bin"] and not names(target)


def test_a_missing_permission_is_reported(tmp_path, unprivileged):
    with pytest.raises(PFStorerError) as raised, files.atomic_write(tmp_path / "a.bin"):
        pass
    assert "permission denied" in one_line(raised) and "may write to" in str(raised.value)


def test_unusable_targets_are_reported_in_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cases = {
        tmp_path / "file" / "a.bin": "a part of its path is a file",
        tmp_path / "missing" / "a.bin": "create its folder first",
        tmp_path: "it is a folder",
        tmp_path / ("n" * 300): "shorter name",
    }
    for target, advice in cases.items():
        with pytest.raises(PFStorerError) as raised, files.atomic_write(target) as handle:
            handle.write(b"x")
        assert advice in one_line(raised)
    assert names(tmp_path) == ["file"]


def test_longest_file_name_still_has_a_temporary_one(tmp_path):
    target = tmp_path / ("n" * 255)
    with files.atomic_write(target) as handle:
        handle.write(b"x")
    assert target.read_bytes() == b"x"


def test_a_pipe_or_device_is_refused_and_survives(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(PFStorerError, match="not a plain file"), files.atomic_write(pipe):
        pass
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_error_about_another_file_is_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, files.atomic_write(tmp_path / "a.bin"):
        (tmp_path / "input that is missing").read_bytes()
    assert "input that is missing" in str(raised.value)
    assert names(tmp_path) == []


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with files.atomic_write(tmp_path / "link") as handle:
        handle.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


def test_mode_holds_before_the_first_byte_and_umask_otherwise(tmp_path):
    old = os.umask(0o027)
    try:
        with files.atomic_write(tmp_path / "plain") as handle:
            handle.write(b"x")
        with files.atomic_write(tmp_path / "private", mode=0o600) as handle:
            assert stat.S_IMODE(os.fstat(handle.fileno()).st_mode) == 0o600
        with files.atomic_write(tmp_path / "open", mode=0o644):
            pass
    finally:
        os.umask(old)
    found = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "private", "open")]
    assert found == [0o640, 0o600, 0o644]


def test_private_file_is_never_readable_by_others(tmp_path, monkeypatch):
    seen = []
    real_open = os.open

    def watched(path, flags, *mode):
        seen.append(mode)
        return real_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", watched)
    with files.atomic_write(tmp_path / "private", mode=0o600):
        pass
    assert seen[0] == (0o600,)  # from the moment that the name exists, not by a later chmod


def test_a_seekable_writer_such_as_zipfile_works(tmp_path):
    with files.atomic_write(tmp_path / "a.zip") as handle, zipfile.ZipFile(handle, "w") as archive:
        archive.writestr("m.json", "{}")
    assert zipfile.ZipFile(tmp_path / "a.zip").read("m.json") == b"{}"


def test_digests_agree_with_hashlib_over_several_chunks(tmp_path):
    data = os.urandom(files._CHUNK * 2 + 17)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == files.sha256_bytes(data) == hashlib.sha256(data).hexdigest()
    # FIPS 180-2, appendix B.1
    assert files.sha256_bytes(b"abc").startswith("ba7816bf8f01cfea")


def test_digest_of_a_missing_file(tmp_path):
    with pytest.raises(BadFileError) as raised:
        files.sha256_file(tmp_path / "missing")
    assert str(tmp_path / "missing") in one_line(raised)


def test_paths_are_shown_on_one_printable_line():
    assert files.show_path("/a/é b.png") == "/a/é b.png"
    assert files.show_path("a\nb") == "'a\\nb'"
    files.show_path(os.fsdecode(b"\xff.png")).encode()  # a lone surrogate would raise here


def write_entries(path, **contents):
    with files.atomic_entries(path, ("mark", "a", "b")) as folder:
        for name, text in contents.items():
            (folder / name).mkdir()
            (folder / name / "x").write_text(text)


def read_entries(path):
    return {str(f.relative_to(path)): f.read_text() for f in path.rglob("*") if f.is_file()}


def test_entries_of_a_folder_are_replaced_together(tmp_path):
    write_entries(tmp_path, mark="1", a="1", b="1")
    (tmp_path / "notes").write_text("mine")
    write_entries(tmp_path, mark="2", a="2")
    assert read_entries(tmp_path) == {"mark/x": "2", "a/x": "2", "notes": "mine"}
    assert names(tmp_path) == ["a", "mark", "notes"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_entries_stay_when_writing_new_ones_fails(tmp_path, error):
    write_entries(tmp_path / "there", mark="1", a="1")
    for folder in (tmp_path / "there", tmp_path / "new"):
        expected = PFStorerError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected), files.atomic_entries(folder, ("mark", "a")) as inside:
            (inside / "a").write_text("2")
            raise error
    assert read_entries(tmp_path) == {"there/mark/x": "1", "there/a/x": "1"}
    assert (names(tmp_path), names(tmp_path / "there")) == (["there"], ["a", "mark"])


@pytest.mark.parametrize("good", range(6))
def test_entries_stay_when_moving_fails_midway(tmp_path, monkeypatch, good):
    write_entries(tmp_path, mark="1", a="1", b="1")
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == good + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PFStorerError, match="cannot be written"):
        write_entries(tmp_path, mark="2", a="2", b="2")
    assert read_entries(tmp_path) == {"mark/x": "1", "a/x": "1", "b/x": "1"}


def test_too_little_disk_space_is_reported_before_writing(tmp_path, set_free_space):
    set_free_space(10**9)
    files.check_space(tmp_path / "no" / "such", 10**9)
    with pytest.raises(PFStorerError, match=r"1500 MB are needed, 1000 MB are free"):
        files.check_space(tmp_path / "no" / "such", 15 * 10**8)


def test_move_file_renames_and_follows_links(tmp_path):
    (tmp_path / "draft").write_text("new")
    (tmp_path / "old").write_text("old")
    os.symlink(tmp_path / "old", tmp_path / "link")
    files.move_file(tmp_path / "draft", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").read_text() == "new"
    with pytest.raises(PFStorerError, match="it is a folder"):
        files.move_file(tmp_path / "old", tmp_path)
    assert (tmp_path / "old").read_text() == "new"


def test_paths_outside_the_folder_are_refused(tmp_path):
    root = tmp_path / "cache"
    assert files.inside(root, "openvino", "0" * 16) == root / "openvino" / ("0" * 16)
    for names in (("..",), ("/etc",), ("a/b",), ("",), (".",), (".hidden",), ("a", ".."), ("a\n",), ("a\\b",)):
        with pytest.raises(ValueError, match="leads out of"):
            files.inside(root, *names)
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out of"):
        files.inside(root, "link")


def test_a_link_to_itself_is_no_folder_and_no_crash(tmp_path):
    (tmp_path / "root").mkdir()
    loop = tmp_path / "root" / "loop"
    loop.symlink_to(loop)
    assert files.real_path(loop).name == "loop"
    assert files.inside(tmp_path / "root", "loop") == loop
    with pytest.raises(PFStorerError, match="cannot be written"), files.atomic_write(loop / "a"):
        pass


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_another_process_writes_meanwhile_stays(tmp_path, monkeypatch, links):
    """os.replace would replace it; exFAT has no hard links."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links")))
    target = tmp_path / "a.bin"
    with (
        pytest.raises(ExistsError, match=r"a\.bin: exists already"),
        files.atomic_write(target, overwrite=False) as handle,
    ):
        handle.write(b"slower")
        target.write_bytes(b"faster")
    assert target.read_bytes() == b"faster" and [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    with files.atomic_write(tmp_path / "b.bin", mode=0o600, overwrite=False) as handle:
        handle.write(b"new")
    assert (tmp_path / "b.bin").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2
