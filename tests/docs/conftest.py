"""The files for the commands of the pages: small images, a nano base named `portrait`, and one shared plan."""

import inspect
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
PAGES += [
    "kernels/README.md",
    "pfstorer_rt/bases/portrait/README.md",
    "CHANGELOG.md",
    "MODEL_LICENSE.md",
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the output that the page shows for it."""

    place: str
    language: str
    text: str
    output: str = ""


def blocks_of(page):
    """The fenced and indented blocks of a page; a `text` block is the output of the block before it in its section."""
    blocks, last = [], None
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text()):
        if token.type == "heading_open":
            last = None
        elif token.type in ("fence", "code_block"):
            block = Block(f"{page}:{token.map[0] + 1}", token.info.strip(), token.content)
            if block.language == "text" and last is not None:
                blocks[last] = replace(blocks[last], output=blocks[last].output + block.text)
                continue
            last = len(blocks) if block.language != "text" else None
            blocks.append(block)
    return blocks


@pytest.fixture(params=PAGES)
def page(request):
    """The name of each page."""
    return request.param


@pytest.fixture
def blocks(page):
    """The blocks of each page."""
    return blocks_of(page)


@pytest.fixture(scope="session")
def read_blocks():
    """Function (name of a page) -> its blocks."""
    return blocks_of


@pytest.fixture(scope="session")
def shipped(nano_base, tmp_path_factory):
    """A folder of shipped bases: `portrait` is the nano base, and learns a person in one iteration."""
    from pfstorer_rt.models.base import build_base

    quick = {"iterations": 1, "batch": 1, "pool": 2}
    folder = tmp_path_factory.mktemp("shipped")
    build_base(replace(nano_base.config, name="portrait", steps=1, personalize=quick)).save(folder / "portrait")
    return folder


@pytest.fixture
def user(tmp_path, monkeypatch, shipped, nano_plan, nano_identity, face):
    """A user's working folder, home and base; `export_plan` copies the one plan instead of exporting for 30 seconds."""
    import pfstorer_rt.export

    from pfstorer_rt.files import sha256_file
    from pfstorer_rt.plan import Plan

    real = pfstorer_rt.export.export_plan

    def export_plan(output, *arguments, **options):
        inspect.signature(real).bind(output, *arguments, **options)
        shutil.copyfile(nano_plan.path, output)
        return Plan.open(output)

    folder, home = tmp_path / "work", tmp_path / "home"
    monkeypatch.setattr("pfstorer_rt.base_files.BUILTIN", shipped)
    monkeypatch.setattr("pfstorer_rt.export.export_plan", export_plan)
    monkeypatch.setenv("PFSTORER_HOME", str(home))
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PFSTORER_PASSPHRASE", "")  # a page may set it
    monkeypatch.setattr(
        "pfstorer_rt.engine.session.auto_order", lambda target: ["onnxruntime"]
    )  # the quickest to start
    make_files(folder, nano_plan.path, face)
    references = tuple(sha256_file(photo) for photo in sorted((folder / "photos" / "alice").iterdir()))
    alice = replace(nano_identity, base_name="portrait", references=references)
    alice.save(home / "identities" / "alice.safetensors")
    return folder


def make_files(folder, plan, face):
    """The files that the pages name: photographs, degraded images, plans."""
    for i in range(5):
        save(folder / "photos" / "alice" / f"{i + 1}.jpg", face[4 * i : 4 * i + 200, 3 * i : 3 * i + 200])
    save(folder / "clean" / "a.png", face[::4, ::4])
    save(folder / "theirs" / "a.png", face[::4, ::4] * 0.9)
    for name in ("old.jpg", "scans/a.jpg", "scans/album/b.jpg", "huge.tif"):
        save(folder / name, face[::5, ::6])
    for name in ("alice.plan", "bob.plan"):
        shutil.copyfile(plan, folder / name)
    (folder / "empty").mkdir()
    (folder / "letter.pdf").write_bytes(b"%PDF-1.4")


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255).astype(np.uint8)).save(path)
