"""The files, headings, options and public names in the pages exist, and their tables equal the results."""

import ast
import csv
import importlib
import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path

import click
import pytest
from markdown_it import MarkdownIt

import pfstorer_rt
from pfstorer_rt.cli.program import COMMANDS, cli

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "docs", "export", "integrations", "kernels", "pfstorer_rt", "tests")


def tokens(path):
    """All tokens of a page, including the tokens of paragraphs."""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        yield token
        yield from token.children or ()


def anchors(path):
    """The anchors of a page's headings, as GitHub names them."""
    found = list(tokens(path))
    titles = [after.content for token, after in pairwise(found) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code(path):
    """The code inside the sentences of a page."""
    return [token.content for token in tokens(path) if token.type == "code_inline"]


def test_links_lead_to_files_and_headings(page):
    path = ROOT / page
    links = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(path)]
    for link in filter(None, links):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{page}: no file {link}"
        assert not anchor or anchor in anchors(file), f"{page}: no heading {link}"


def test_named_files_exist(page):
    for name in code(ROOT / page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]+", name):
            assert any(ROOT.glob(name.replace("NAME", "*"))), f"{page}: no file {name}"


@pytest.fixture(scope="module")
def options():
    """Every option of every command, and the text of the benchmarks."""
    known = set()
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        for leaf in (command, *getattr(command, "commands", {}).values()):
            known |= {option for parameter in leaf.params for option in parameter.opts}
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    return known | set(re.findall(r'"(--[\w-]+)"', scripts)) | {"--help", "--version"}


FOREIGN = {"--extra-index-url", "--no-deps", "--gpus"}
"""Options of pip and docker."""


def test_named_options_exist(page, options):
    named = {option for text in code(ROOT / page) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert not named - options - FOREIGN, page


def test_named_modules_and_attributes_exist(page):
    for name in code(ROOT / page):
        if re.fullmatch(r"pfstorer_rt(\.\w+)+", name):
            assert resolve(name), f"{page}: no {name}"
        owner, _, attribute = name.partition("(")[0].partition(".")
        if owner in pfstorer_rt.__all__ and attribute.isidentifier() and attribute != "py":  # not a file
            kind = getattr(pfstorer_rt, owner)
            known = set(dir(kind)) | set(kind.__annotations__) | set(assigned(kind))
            assert attribute in known, f"{page}: {owner} has no {attribute}"


def resolve(name):
    """Whether a dotted name is a module, or an attribute of one."""
    owner, _, attribute = name.rpartition(".")
    if not importlib.util.find_spec(owner):
        return False
    module = importlib.import_module(owner)
    return hasattr(module, attribute) or (hasattr(module, "__path__") and importlib.util.find_spec(name) is not None)


def assigned(kind):
    """The attributes that a class sets on `self`."""
    tree = ast.parse(Path(importlib.import_module(kind.__module__).__file__).read_text())
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


def test_the_api_page_uses_every_public_name():
    text = (ROOT / "docs" / "python_api.md").read_text()
    snippets = [t.content for t in MarkdownIt("commonmark").parse(text) if t.type == "fence" and t.info == "python"]
    used = {node.id for snippet in snippets for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Name)}
    assert not {*pfstorer_rt.__all__, "export_plan"} - used


def test_every_page_is_in_the_index(page):
    linked = (ROOT / "docs" / "index.md").read_text() + (ROOT / "README.md").read_text()
    assert page == "README.md" or Path(page).name in linked


def test_the_tables_equal_the_committed_results(tmp_path, monkeypatch):
    """The tables of the pages are what the benchmarks make of the committed rows."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    document, people = importlib.import_module("tables_document"), importlib.import_module("people")
    common = importlib.import_module("common")
    source = Path("benchmarks/results/tables.csv")
    with (ROOT / source).open(newline="") as file:
        rows = list(csv.DictReader(file))
    document.write_document(tmp_path / "results.md", rows, source)
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
    whole = importlib.import_module("whole")
    for script, page in ((people, ROOT / "README.md"), (whole, ROOT / "docs" / "restore.md")):
        name = Path(script.__file__).stem
        table = script.table(script.read(ROOT / "benchmarks" / "results" / f"{name}.csv"))
        assert common.with_table(page.read_text(), f"{name}.py", table) == page.read_text()
    fuzz, page = importlib.import_module("fuzz"), ROOT / "docs" / "reliability.md"
    table = fuzz.table(json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text()))
    assert common.with_table(page.read_text(), "fuzz.py", table) == page.read_text()
    for group in document.same_people([r for r in rows if r["level"] == "heavy"]):
        people = {method: {r["person"] for r in mine} for method, mine in document.by(group, "method").items()}
        assert len(set(map(frozenset, people.values()))) == 1
