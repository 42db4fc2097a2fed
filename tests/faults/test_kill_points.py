"""A process that is killed while it writes leaves the old file or the new one, and nothing after the next run."""

import importlib.util
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from pfstorer_rt.imaging.files import save_image

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_points.py"
spec = importlib.util.spec_from_file_location("kill_points", FILE)
kill_points = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill_points)


@pytest.fixture
def known(nano_base, tmp_path):
    """The works of the script, and a folder for them."""
    save_image(tmp_path / "photo.png", np.random.default_rng(0).random((80, 72, 3), np.float32))
    (tmp_path / "runs").mkdir()
    return kill_points.works(nano_base, tmp_path / "photo.png"), tmp_path / "runs"


def test_restore_is_killed_before_each_write(known):
    works, parent = known
    assert len(list(kill_points.kill_everywhere(*works["restore"], parent))) >= 5


def test_personalize_is_killed_before_some_writes_and_resumes(known):
    works, parent = known
    assert list(kill_points.kill_everywhere(*works["personalize"], parent, start=4, stride=6)) == [4, 10, 16]


@pytest.mark.parametrize("fault", ["half-written", "leftover"])
def test_the_check_finds_a_work_that_is_not_atomic(tmp_path, fault):
    def careless(folder):
        if fault == "leftover":
            (folder / f"{len(list(folder.iterdir()))}.tmp").write_bytes(b"x")
        (folder / "out").write_bytes(b"")  # the new content follows in a second write
        with (folder / "out").open("ab") as file:
            file.write(b"new")

    with pytest.raises(AssertionError, match=r"half-written|another run"):
        list(kill_points.kill_everywhere(careless, lambda folder: None, "out", tmp_path))


def refuse_sockets(event, arguments):
    """An audit hook: every use of a socket is an error."""
    if event.startswith("socket."):
        raise PermissionError(f"{event} {arguments}")


@pytest.mark.parametrize("command", ["restore", "personalize"])
def test_no_command_opens_a_socket(known, command):
    works, parent = known
    work, prepare, output = works[command]
    prepare(parent)

    def isolated(folder):
        sys.addaudithook(refuse_sockets)
        work(folder)

    assert kill_points.run(isolated, parent) and (parent / output).is_file()
    with pytest.raises(RuntimeError, match="the work failed"):
        kill_points.run(lambda folder: [sys.addaudithook(refuse_sockets), socket.socket()], parent)
