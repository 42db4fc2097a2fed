"""How the command line shows errors: one line, the flag of the setting at fault, and an exit status."""

import sys
from types import SimpleNamespace

import click
import pytest

from pfstorer_rt.cli import COMMANDS
from pfstorer_rt.cli.options import explain
from pfstorer_rt.errors import BadFileError, PFStorerError, SettingError, one_line


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (SettingError("steps 0: expected 1 to 1000"), 2, "Error: steps 0: expected 1 to 1000"),
        (BadFileError("a.plan: not built here", setting="trust"), 2, "Error: a.plan: not built here (--trust-plan)"),
        (PFStorerError("a.png: exists already", setting="overwrite"), 1, "Error: a.png: exists already (--overwrite)"),
        (OSError("disk\nfailure"), 1, "Error: disk failure"),
        (
            ValueError("operands could not be broadcast\ntogether"),
            1,
            "Error: unexpected ValueError: operands could not be broadcast together (set PFSTORER_DEBUG=1 for details)",
        ),
        (KeyboardInterrupt(), 130, "Error: Interrupted. Run the same command again to resume."),
    ],
)
def test_an_error_prints_one_line_and_sets_the_exit_status(refused, monkeypatch, error, status, line):
    @click.command()
    def command():
        raise error

    monkeypatch.setitem(COMMANDS, "fail", ("fail", ""))
    monkeypatch.setitem(sys.modules, "pfstorer_rt.cli.fail", SimpleNamespace(command=command))
    assert refused(status, "fail") == line


def test_the_help_names_the_variable_for_tracebacks(run):
    assert "PFSTORER_DEBUG=1" in run("--help").out


def test_only_messages_of_other_libraries_are_shortened():
    long = "word " * 100
    assert len(one_line(RuntimeError(long))) == 200 and one_line(PFStorerError(long)) == long.strip()
    assert one_line(RuntimeError()) == "RuntimeError"
    assert explain(PFStorerError("message", setting="max_pixels")) == "message (--max-pixels)"
