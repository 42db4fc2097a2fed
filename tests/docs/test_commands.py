"""Every command and snippet of the pages runs; commands that cannot run here are only parsed."""

import ast
import contextlib
import glob
import importlib.util
import io
import os
import re
import shlex
import shutil
import traceback
from pathlib import Path

import click
import pytest

from pfstorer_rt.cli import main
from pfstorer_rt.cli.program import cli

ROOT = Path(__file__).resolve().parents[2]
FAILURE = re.compile(r"^(Error|failed):", re.MULTILINE)
ELSEWHERE = {"--arcface", "--alexnet", "--musiq", "--provider", "--attention", "--device", "--cfw-weight"}
"""Options that need files, packages, devices or networks that may be missing here."""


def is_only_parsed(words):
    """Whether a command takes hours, never ends, or needs weights or devices that may be missing."""
    endless = "--watch" in words and "--idle" not in words
    foreign = "stablesr" in words or any(word.startswith("tensorrt") or word == "alice_rtx.plan" for word in words)
    return (
        words[0] in ("train-base", "import-base", "demo", "bench", "studio")
        or endless
        or foreign
        or ELSEWHERE & set(words)
    )


def parse(words):
    """Parse a command as the command line does, without its files; raises `click.UsageError`."""
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, f"no command {words[0]}"
    context = click.Context(command, info_name=words[0])
    values, _, _ = command.make_parser(context).parse_args(list(words[1:]))
    for option in command.params:
        if isinstance(option, click.Option) and option.name in values and not isinstance(option.type, click.Path):
            option.type_cast_value(context, values[option.name])


def run(words):
    """Run a command in this process; returns its exit status."""
    if is_only_parsed(words):
        return parse(words)
    if "--recipe" in words:  # replaces the settings of the small base, which learns in one iteration
        words = [*words, "--iterations", "1"]
    try:
        main(list(words))
    except SystemExit as end:
        return end.code or 0
    return 0


def check_python(words):
    """`python -m MODULE ...` or `python FILE ...`: the module or file exists and knows the options."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
        return
    source = (ROOT / words[0]).read_text()
    unknown = [word for word in words[1:] if word.startswith("-") and f'"{word}"' not in source]
    assert not unknown, f"{words[0]} has no option {unknown}"


def check_pip(words):
    """`pip install`: the extras of this package exist."""
    declared = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"\[([\w,-]+)\]", " ".join(words))
    unknown = [e for group in extras for e in group.split(",") if not re.search(rf"^{e} = \[", declared, re.MULTILINE)]
    assert words[0] == "install" and not unknown, f"no extra {unknown}"


def check_make(words):
    """`make`: the targets exist."""
    targets = [word for word in words if "=" not in word]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets), words


def check_accelerate(words):
    """`accelerate launch -m pfstorer_rt COMMAND ...`."""
    assert words[:3] == ["launch", "-m", "pfstorer_rt"]
    parse(words[3:])


def unpack(words):
    """`tar -xJf ARCHIVE`: the archive is part of the repository; the small base takes the place of its content."""
    from pfstorer_rt import base_files

    (option, archive), (shipped,) = words, base_files.BUILTIN.iterdir()
    assert option == "-xJf" and (ROOT / archive).exists(), f"no archive {archive}"
    shutil.copytree(shipped, Path(archive).name.split(".")[0])


def set_variable(words):
    """`export NAME=VALUE`; the fixture `user` restores the variables that a page may set."""
    name, value = words[0].split("=", 1)
    assert name == "PFSTORER_PASSPHRASE", name
    os.environ[name] = value


PROGRAMS = {
    "export": set_variable,
    "pfstorer-rt": run,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "make": check_make,
    "tar": unpack,
    "accelerate": check_accelerate,
}


def run_line(line):
    """Run one line of a shell block in the current folder; returns its exit status."""
    words = shlex.split(line, comments=True)
    if not words:
        return 0
    target = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if target else words
    program = words[0].removeprefix(".venv/bin/")
    assert program in PROGRAMS, f"{program}: not a program that a page may use"
    found = [name for word in words[1:] for name in (sorted(glob.glob(word)) or [word])]
    if target is None:
        return PROGRAMS[program](found)
    with Path(target).open("w") as file, contextlib.redirect_stdout(file):
        return PROGRAMS[program](found)


def run_shell(block):
    """Run a shell block; only its last command may fail, and only if the page shows the failure."""
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
    for line in lines:
        status = run_line(line)
        expected = bool(FAILURE.search(block.output)) and line is lines[-1]
        assert bool(status) == expected, f"{line}\nexit status {status}"


def run_python(block):
    """Run a snippet by itself."""
    exec(compile(block.text, block.place, "exec"), {"__name__": "snippet"})


RUNNERS = {"bash": run_shell, "python": run_python}


def missing_lines(shown, printed):
    """The lines of a page's output that the program did not print; `...` stands for any text."""
    patterns = {line: ".*".join(map(re.escape, line.split("..."))) for line in shown.splitlines()}
    return [line for line, pattern in patterns.items() if not re.search(rf"^{pattern}$", printed, re.MULTILINE)]


def test_commands_and_snippets_run_and_print_the_shown_output(blocks, user):
    shell = "".join(block.text for block in blocks if block.language == "bash")
    if "personalize --identity alice" in shell:  # the page itself makes this file
        (user.parent / "home" / "identities" / "alice.safetensors").unlink()
    if "-o alice.plan" in shell:
        (user / "alice.plan").unlink()
    for block in blocks:
        if block.language == "text":
            continue
        assert block.language in RUNNERS, f"{block.place}: a block of {block.language or 'no language'!r}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                RUNNERS[block.language](block)
            except (Exception, SystemExit):
                pytest.fail(f"{block.place}: {traceback.format_exc(limit=-2)}\n{printed.getvalue()}")
        missing = missing_lines(block.output, printed.getvalue())
        assert not missing, f"{block.place}: the page shows {missing}\nprinted was {printed.getvalue()}"


@pytest.fixture(scope="module")
def messages():
    """All texts in the sources, with `...` for their values."""
    texts = [(ROOT / "Makefile").read_text()]
    for folder in ("pfstorer_rt", "export", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_messages_without_a_command_are_in_the_sources(read_blocks, messages):
    """A `text` block after no command; a message is cut at `...`, which stands for its values."""
    for block in read_blocks("docs/troubleshooting.md"):
        if block.language != "text":
            continue
        for line in block.text.splitlines():
            parts = [part.strip(" :;,()") for part in re.split(r"\.\.\.|left out: |; ", line)]
            unknown = [part for part in parts if part not in messages]
            assert not unknown, f"{block.place}: no source has {unknown}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pfstorer-rt restore --engine alice.plan old.jpg --stepps 4", "--stepps"),
        ("pfstorer-rt train-base photos/ -o my-base --wider 2", "--wider"),
        ("pfstorer-rt bench --engine alice.plan --backend onnx", "onnx"),
        ("python benchmarks/seams.py --sizes 960", "--sizes"),
        ("pip install '.[metric]'", "metric"),
        ("make tests", "tests"),
        ("curl example.org", "curl"),
    ],
)
def test_invalid_commands_are_detected(user, line, words, capsys):
    try:
        status = run_line(line)
    except (AssertionError, click.ClickException) as error:
        assert words in str(getattr(error, "message", error))
    else:
        assert status == 2 and words in capsys.readouterr().err
