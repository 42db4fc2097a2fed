import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pfstorer_rt import temporary
from pfstorer_rt.files import atomic_entries, atomic_write, make_folder, work_folder
from pfstorer_rt.temporary import sweep

KILLED = """
import sys, time
from pathlib import Path
from pfstorer_rt.files import atomic_write, work_folder

with work_folder() as folder, atomic_write(sys.argv[1], mode=0o600) as file:
    (folder / "denoiser.weights").write_bytes(b"a person")
    file.write(b"a person")
    file.flush()
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """A process that is killed while it writes: (its work folder, the folder of its output, the process)."""
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out / "a.plan")], stdout=subprocess.PIPE, text=True)
    folder = process.stdout.readline().strip()
    yield folder, out, process
    process.kill()
    process.wait()


def test_a_living_process_keeps_its_temporary_files(killed):
    folder, out, _ = killed
    assert sweep(out) == []
    with work_folder() as own:
        assert own.parent == Path(folder).parent
    assert os.listdir(folder) == ["denoiser.weights"] and len(os.listdir(out)) == 1


def test_the_next_run_removes_files_of_a_killed_process(killed):
    folder, out, process = killed
    process.kill()
    process.wait()
    assert os.path.isdir(folder) and len(os.listdir(out)) == 1, "a killed process removes nothing itself"
    other = "from pfstorer_rt.files import atomic_write, work_folder; import sys\n"
    other += "with work_folder(), atomic_write(sys.argv[1]) as file: file.write(b'new')"
    subprocess.run([sys.executable, "-c", other, str(out / "b.plan")], check=True)
    assert not os.path.exists(folder)
    assert os.listdir(out) == ["b.plan"]


def test_a_work_folder_is_private_and_removed_after_the_block(tmp_path, monkeypatch):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path))
    mask = os.umask(0)
    try:
        with work_folder() as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.is_relative_to(tmp_path / "cache")
            (folder / "file").write_bytes(b"x")
    finally:
        os.umask(mask)
    assert not folder.exists()


def test_a_work_folder_is_on_the_file_system_of_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    near = tmp_path / "disk"
    near.mkdir()
    with work_folder(near) as folder:
        assert folder.is_relative_to(tmp_path / "home" / "cache")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:  # another file system
        with work_folder(Path(memory)) as folder:
            assert folder.parent == Path(memory)
        assert os.listdir(memory) == []


def test_folders_with_a_users_own_files_are_never_removed(tmp_path):
    lost, base = tmp_path / ".pfstorer-0123.tmp", tmp_path / ".pfstorer-4567.tmp"
    (lost / "new").mkdir(parents=True)
    (base / "old").mkdir(parents=True)
    (base / "old" / "config.json").write_text("{}")
    assert sweep(tmp_path) == [lost]
    assert (base / "old" / "config.json").exists()


def test_links_and_files_with_other_names_are_not_removed(tmp_path):
    target = tmp_path / "photos"
    target.mkdir()
    (tmp_path / ".pfstorer-89ab.tmp").symlink_to(target)
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / ".pfstorer-notes").write_text("mine")
    assert sweep(tmp_path) == []
    assert len(os.listdir(tmp_path)) == 4


def test_replacing_a_folder_leaves_no_temporary_folder(tmp_path):
    with atomic_entries(tmp_path / "base", ("config.json",)) as folder:
        (folder / "config.json").write_text("{}")
        assert sweep(tmp_path / "base") == [], "it is in use"
    assert os.listdir(tmp_path / "base") == ["config.json"]


def test_a_finished_file_is_not_removed_before_it_is_renamed(tmp_path, monkeypatch):
    """Another process sweeps when the file is complete, still open, and not yet renamed."""
    real = os.replace

    def replace(source, target):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from pathlib import Path; from pfstorer_rt.temporary import sweep\n"
                "print(len(sweep(Path(sys.argv[1]))))",
                str(tmp_path),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "0"
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


def no_locks(descriptor, operation):
    """flock on a file system without locks."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("locks", [None, SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=no_locks)])
def test_old_files_are_removed_where_files_cannot_be_locked(tmp_path, monkeypatch, locks):
    monkeypatch.setattr(temporary, "fcntl", locks)  # None: Windows
    new, old = tmp_path / ".pfstorer-1.tmp", tmp_path / ".pfstorer-2.tmp"
    new.write_bytes(b"x")
    old.write_bytes(b"x")
    long_ago = time.time() - 30 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    assert sweep(tmp_path) == [old]


def test_files_moved_in_during_a_sweep_are_kept(tmp_path, monkeypatch):
    """A process moves a user's files into the folder and is killed before the sweep locks the folder."""
    folder = tmp_path / ".pfstorer-1.tmp"
    (folder / "old").mkdir(parents=True)
    real = fcntl.flock

    def flock(descriptor, operation):
        (folder / "old" / "config.json").write_text("{}")
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert sweep(tmp_path) == []
    assert (folder / "old" / "config.json").exists()


@pytest.mark.parametrize("beside", [True, False])
def test_a_work_folder_is_made_elsewhere_without_a_cache_directory(tmp_path, monkeypatch, beside):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "system"))
    (tmp_path / "system").mkdir()
    near = tmp_path / "near"
    near.mkdir()
    with work_folder(near if beside else None) as folder:
        assert folder.parent == (near if beside else tmp_path / "system")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_data_folders_are_private_with_any_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "deep" / "home"))
    mask = os.umask(0)
    try:
        made = [make_folder(tmp_path / "deep" / "home" / name) for name in ("identities", "cache/work")]
        assert {stat.S_IMODE(p.stat().st_mode) for p in (*made, made[0].parent, made[1].parent)} == {0o700}
        assert stat.S_IMODE(make_folder(tmp_path / "photos").stat().st_mode) == 0o777
        assert stat.S_IMODE(make_folder(tmp_path / "work", private=True).stat().st_mode) == 0o700
    finally:
        os.umask(mask)
