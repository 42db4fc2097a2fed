"""How the command line shows errors: one line, the flag of the setting at fault, and an exit status."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import click
import pytest

from pfstorer_rt.cli.options import explain, export_command
from pfstorer_rt.cli.program import COMMANDS, cli, interrupted
from pfstorer_rt.errors import BadFileError, MissingBackendError, PFStorerError, Rebuild, SettingError, one_line


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
        (KeyboardInterrupt(), 130, "Error: Interrupted. Unfinished files were removed."),
    ],
)
def test_an_error_prints_one_line_and_sets_the_exit_status(refused, monkeypatch, error, status, line):
    @click.command()
    @click.option("--trust-plan")
    @click.option("--overwrite")
    def command(**_):
        raise error

    monkeypatch.setitem(COMMANDS, "fail", ("fail", ""))
    monkeypatch.setitem(sys.modules, "pfstorer_rt.cli.fail", SimpleNamespace(command=command))
    assert refused(status, "fail") == line


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("personalize", "Run the same command again to resume."),
        ("fix", "Finished images are kept; the same command learns the person again and restores the others."),
        ("export", "Unfinished files were removed."),
    ],
)
def test_an_interrupted_command_names_what_remains(name, advice):
    assert interrupted(KeyboardInterrupt("iteration 3"), [name]) == f"Interrupted (iteration 3). {advice}"


@pytest.mark.parametrize(
    "call", [("degrade", "a.png", "-o", "-"), ("restore", "--base", "portrait", "-o", "-", "a.png")]
)
def test_images_are_not_written_to_a_terminal(call, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(click.UsageError, match="standard output is a terminal"):
        cli.main(call, standalone_mode=False)


def test_a_flag_that_the_command_does_not_have_is_not_named(run, refused, save, tmp_path, monkeypatch):
    image = save(tmp_path / "a.png")
    line = refused(2, "degrade", image, "-o", image, "--overwrite")
    assert line.endswith("would be written over an input; use a suffix or another folder")
    monkeypatch.setattr("pfstorer_rt.runtime.degrading.MAX_PIXELS", 100)
    (failed,) = run("degrade", image, "-o", tmp_path / "b.png").errors
    assert failed.endswith("expected at most 100; make the image smaller or raise the limit")
    assert refused(2, "degrade", image, "-o").endswith("(pfstorer-rt degrade --help)")


def test_the_help_names_the_variable_for_tracebacks(run):
    assert "PFSTORER_DEBUG=1" in run("--help").out


def test_only_messages_of_other_libraries_are_shortened():
    long = "word " * 100
    assert len(one_line(RuntimeError(long))) == 200 and one_line(PFStorerError(long)) == long.strip()
    assert one_line(RuntimeError()) == "RuntimeError"
    assert explain(PFStorerError("message", setting="max_pixels")) == "message (--max-pixels)"


@pytest.mark.parametrize(
    ("identity", "base", "gpus", "words"),
    [
        (None, "portrait", (), "--base portrait --target onnx --precision fp32 -o a.plan --overwrite"),
        (None, None, (), "--base DIR --target onnx"),
        ("al", "portrait", (), "--identity al --target onnx"),
        ("al", None, (), "--identity al --base DIR --target onnx"),
        ("al", "portrait", ("8.6", "8.9"), "--precision fp32 --compute-capability 8.6 --compute-capability 8.9 -o"),
    ],
)
def test_a_plan_that_must_be_exported_again_comes_with_the_command(identity, base, gpus, words):
    rebuild = Rebuild(identity, base, "onnx", "fp32", gpus, "a.plan")
    told = explain(BadFileError("a.plan: too old", setting="trust", rebuild=rebuild))
    assert told.startswith("a.plan: too old (--trust-plan); to export it: `pfstorer-rt export ")
    assert words in told
    command = cli.get_command(click.Context(cli), "export")
    assert command.make_context("export", export_command(rebuild).split()[2:]).params["output"].name == "a.plan"


def test_a_command_to_copy_quotes_the_name_of_the_file():
    rebuild = Rebuild(None, "portrait", "onnx", "fp32", (), "a;reboot;.plan")
    assert "-o 'a;reboot;.plan' --overwrite" in export_command(rebuild)


def test_the_error_for_an_unknown_command_names_the_most_similar_one(refused):
    assert "Did you mean 'restore'?" in refused(2, "restor")
    assert "mean" not in refused(2, "xyz")


def test_an_interruption_that_a_library_turns_into_another_error_stays_an_interruption(refused, monkeypatch):
    @click.command()
    def command():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise MissingBackendError("onnxruntime is not installed") from error

    monkeypatch.setitem(COMMANDS, "fail", ("fail", ""))
    monkeypatch.setitem(sys.modules, "pfstorer_rt.cli.fail", SimpleNamespace(command=command))
    assert refused(130, "fail") == "Error: Interrupted. Unfinished files were removed."


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_closed_terminal_interrupts_a_command_without_nohup(run, monkeypatch, ignored):
    @click.command()
    def command():
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setitem(COMMANDS, "fail", ("fail", ""))
    monkeypatch.setitem(sys.modules, "pfstorer_rt.cli.fail", SimpleNamespace(command=command))
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    assert run("fail").status == (0 if ignored else 130)


def test_a_second_ctrl_c_does_not_interrupt_the_end_of_the_program(run, monkeypatch):
    @click.command()
    def command():
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(COMMANDS, "fail", ("fail", ""))
    monkeypatch.setitem(sys.modules, "pfstorer_rt.cli.fail", SimpleNamespace(command=command))
    assert run("fail").status == 130
    signal.raise_signal(signal.SIGTERM)
    assert run("fail").status == 130, "the next command is interrupted again"


INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from pfstorer_rt.cli import main
main(["--help"])
"""


@pytest.mark.parametrize(
    "module", ["pfstorer_rt.cli.program", "click", "pfstorer_rt.encryption", "pfstorer_rt.console"]
)
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "background"])
def test_an_interruption_during_the_first_imports_prints_one_line(module, ignored):
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)

    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module]
    done = subprocess.run(command, preexec_fn=prepare, capture_output=True, text=True, timeout=100, check=False)
    if ignored:
        assert (done.returncode, done.stderr) == (0, "") and "Usage:" in done.stdout
    else:
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr.startswith("Error: Interrupted.") and done.stderr.count("\n") == 1


def test_nearly_nothing_is_imported_before_ctrl_c_is_handled():
    """Until `main` runs, Ctrl-C prints a traceback. The script of the command imports `re`."""
    code = "import re, sys; before = {*sys.modules}; import pfstorer_rt.cli; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert {*done.stdout.split()} <= {"pfstorer_rt", "pfstorer_rt.cli", "signal"}


def run_closed(closed, *arguments):
    """Run a command in a process whose standard streams `closed` are closed; returns (status, printed text)."""
    code = "import sys; from pfstorer_rt.cli import main; main(sys.argv[1:])"

    def close():
        for number in closed:
            os.close(number)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, preexec_fn=close, text=True, timeout=100, check=False, **pipes)
    return done.returncode, done.stdout


@pytest.fixture
def plan_options(nano_plan):
    return ("restore", "--engine", nano_plan.path, "--backend", "onnxruntime", "--steps", 1)


def test_a_command_runs_without_standard_streams(plan_options, save, tmp_path):
    image = save(tmp_path / "a.png")
    assert run_closed((0, 1, 2), *plan_options, image, "-o", tmp_path / "b.png") == (0, "")
    assert run_closed((), *plan_options, image, "-o", tmp_path / "c.png")[0] == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_a_closed_stream_as_input_or_output_is_one_line(plan_options, save, tmp_path):
    status, text = run_closed((0,), *plan_options, "-", "-o", tmp_path / "b.png")
    assert status == 1 and "0 bytes" in text and "unexpected" not in text
    status, text = run_closed((1,), *plan_options, save(tmp_path / "a.png"), "-o", "-")
    assert status == 1 and "standard output is closed" in text


def test_libraries_do_not_use_the_hub(run, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run("--help")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
