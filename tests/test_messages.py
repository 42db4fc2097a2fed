"""Messages of the library serve Python users too: they name settings, and the command line adds its options."""

import ast
import re
from pathlib import Path

import click
import pytest

from pfstorer_rt.cli.options import flag
from pfstorer_rt.cli.program import COMMANDS, cli

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = [
    path
    for folder in ("pfstorer_rt", "export", "kernels/ops")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "cli" not in path.parts and path.name != "aot.py"  # aot.py is a program with options of its own
]
OF_THE_COMMAND_LINE = re.compile(r"--[a-z]|(?<![\w-])-[a-z](?![\w-])|pfstorer-rt [a-z]")


def texts(path):
    """(line, text) of every string of a file that is no docstring."""
    tree = ast.parse(path.read_text())
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    docstrings = {id(s.value) for body in bodies for s in body if isinstance(s, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_the_library_names_no_option_and_no_command():
    assert len(LIBRARY) > 80
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in LIBRARY
        for line, text in texts(path)
        if OF_THE_COMMAND_LINE.search(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["give --base DIR", "choose -o", "run `pfstorer-rt export`", "x (--lpips FILE)"])
def test_texts_of_the_command_line_are_recognized(text):
    assert OF_THE_COMMAND_LINE.search(text)


def test_every_setting_that_an_error_names_has_an_option():
    options = set()
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        for leaf in (command, *getattr(command, "commands", {}).values()):
            options |= {option for parameter in leaf.params for option in parameter.opts}
    named = {
        keyword.value.value
        for path in LIBRARY
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "setting" and isinstance(keyword.value, ast.Constant)
    }
    assert {"trust", "overwrite", "max_pixels"} <= named
    unknown = {setting for setting in named if setting and flag(setting) not in options}
    assert not unknown
