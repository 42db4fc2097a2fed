"""A studio without a browser: its workspace, a page, a base with one person, and pictures."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.studio.config import Limits, StudioConfig
from pfstorer_rt.studio.engines import Engines
from pfstorer_rt.studio.workspace import open_workspace

LIMITS = Limits(file_bytes=1 << 20, files=5, pixels=400_000, total_bytes=4 << 20)


def silent(*_, **__):
    """A report that nobody reads."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty data directory."""
    monkeypatch.setenv("PFSTORER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def quick_base(nano_base, tmp_path_factory):
    """Directory of a nano base that learns a person in four iterations."""
    from pfstorer_rt.models.base import build_base

    config = replace(nano_base.config, steps=1, personalize={"iterations": 4, "batch": 1, "pool": 2})
    return build_base(config, seed=0).save(tmp_path_factory.mktemp("quick") / "quick")


@pytest.fixture
def workspace():
    with open_workspace(LIMITS) as found:
        yield found


@pytest.fixture
def session(workspace):
    return workspace.session("a page")


@pytest.fixture
def engines(home, quick_base):
    found = Engines(StudioConfig(base=quick_base))
    yield found
    found.close()


@pytest.fixture
def known_alice(home, make_nano_identity, face):
    """Alice with the embedding of the face."""
    import torch

    from pfstorer_rt.faces.finding import embed_all

    identity = make_nano_identity()
    identity.tensors["face"] = torch.from_numpy(embed_all(face)[0].embedding).half()
    identity.save(home / "identities" / "alice.safetensors")
    return "identity:alice"


@pytest.fixture
def drop(workspace, make_image, tmp_path):
    """Function (names) -> paths of uploaded pictures, as the page passes them on."""

    def make(*names, seed=0, pixels=None):
        files = []
        for number, name in enumerate(names):
            folder = workspace.uploads / f"{seed}{number}"
            folder.mkdir(exist_ok=True)
            image = make_image(70, 60, seed=seed + number) if pixels is None else pixels
            Image.fromarray((image * 255).astype(np.uint8)).save(folder / name)
            files.append(str(folder / name))
        return files

    yield make
    shutil.rmtree(tmp_path / "drop", ignore_errors=True)
