import os
import subprocess
import sys

import click
import pytest

from pfstorer_rt.cli.program import COMMANDS, cli

HEAVY = {
    "torch",
    "diffusers",
    "numpy",
    "transformers",
    "accelerate",
    "onnx",
    "onnxruntime",
    "PIL",
    "skimage",
    "rich",
    "safetensors",
    "scipy",
}
OPTIONS = {  # options used by scripts
    "personalize": "--identity --base --method --iterations --rank --seed -o",
    "export": "--identity --base --target --precision -o",
    "restore": "--engine --base -o --steps --sampler --seed --strength --scale --backend --color-fix",
    "degrade": "-o --level --seed",
    "inspect": "--json",
    "bench": "--engine --json",
    "evaluate": "--refs --hq --outputs --json",
    "import-base": "--sd --dtype -o",
}


def load(name):
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)
    return command


def leaves(name):
    """A command and its sub-commands, as lists of words."""
    command = load(name)
    return [[name], *([name, sub] for sub in getattr(command, "commands", {}))]


def test_help_imports_no_heavy_package():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pfstorer_rt", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "click" in imported, "the import log was not understood"
    assert not imported & HEAVY
    assert all(name in done.stdout for name in COMMANDS)


def test_help_is_quick():
    def seconds():
        process = subprocess.Popen([sys.executable, "-m", "pfstorer_rt", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime  # not wall clock: the machine may be busy with other work

    assert min(seconds() for _ in range(3)) < 0.4


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_shows_an_example(run, name):
    for words in leaves(name):
        shown = run(*words, "--help")
        assert shown.status == 0 and "Example" in shown.out
        assert f"pfstorer-rt {' '.join(words)}" in shown.out.split("Example", 1)[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_used_by_scripts_exist(name):
    known = {option for parameter in load(name).params for option in parameter.opts}
    assert set(OPTIONS[name].split()) <= known


def test_unknown_command_and_version(run):
    wrong = run("restrore")
    assert wrong.status == 2 and "restrore" in wrong.err
    assert run("--version").out.startswith("pfstorer-rt, version ")


@pytest.mark.parametrize("arguments", [(), ("identities",)])
def test_a_group_without_a_command_prints_its_help(run, arguments):
    done = run(*arguments)
    assert done.status == 2
    lines = done.err.splitlines()
    assert lines[0].startswith("Usage: pfstorer-rt") and len(lines) > 8, "not an error on one line"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_help_shows_no_missing_bounds(run, name):
    assert "None]" not in run(name, "--help").stdout.decode()
