"""Names that a terminal cannot print, or that would control it."""

import io
import os
import re
import sys
from pathlib import Path

import pytest

import pfstorer_rt.cli
from pfstorer_rt.cli import main
from pfstorer_rt.cli.progress import batch_bars
from pfstorer_rt.runtime.jobs import Job

NAMES = ["照片.png", os.fsdecode(b"caf\xe9.png"), "a\x1b[2Jb.png", "two\nlines.png", "[red]x.png"]


class Terminal(io.TextIOWrapper):
    """A strict text stream with an encoding, as a terminal or PYTHONIOENCODING gives it."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    @property
    def text(self):
        return self.buffer.getvalue().decode("utf-8" if self.encoding == "ascii" else self.encoding)


@pytest.fixture
def on_terminal(monkeypatch):
    """Function (encoding, *arguments) -> (status, stdout, stderr) of a command on strict streams."""

    def call(encoding, *arguments):
        out, err = Terminal(encoding), Terminal(encoding)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        monkeypatch.undo()
        return ended.value.code, out.text, err.text

    return call


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_every_name_is_one_printable_line_on_any_terminal(on_terminal, save, tmp_path, encoding):
    for name in NAMES:
        save(tmp_path / "in" / name, 16, 16)
    status, out, err = on_terminal(encoding, "degrade", tmp_path / "in", "-o", tmp_path / "out")
    assert status == 0 and len(list((tmp_path / "out").iterdir())) == len(NAMES), err
    lines = out.splitlines()
    assert len(lines) == len(NAMES) and all(line.isprintable() for line in lines), lines
    status, out, err = on_terminal(encoding, "degrade", tmp_path / "none" / NAMES[0], tmp_path / NAMES[1], "-o", "x/")
    *lines, last = err.splitlines()
    assert last == "2 images: 2 failed"
    assert status == 1 and len(lines) == 2 and all("no such file" in line and line.isprintable() for line in lines)


@pytest.mark.parametrize("name", ["[red]x.png", "[x]y.png", "a\x1b[2Jb.png"])
def test_a_bar_shows_a_name_and_does_not_interpret_it(monkeypatch, name):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = Terminal("utf-8")
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with batch_bars("restore", 1) as show:
        show(Job(Path(name), None, True), 0, 0)
    monkeypatch.undo()
    assert name.replace("\x1b", "\\x1b") in screen.text


def test_commands_print_only_through_the_console():
    folder = Path(pfstorer_rt.cli.__file__).parent
    printing = {path.name for path in folder.glob("*.py") if re.search(r"click\.s?echo\(", path.read_text())}
    assert not printing
