"""A user's type checker sees the real types of the public names."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pfstorer_rt

ROOT = Path(__file__).resolve().parent.parent
# The types of these packages do not matter here, and reading torch alone takes a minute.
SETTINGS = """
[mypy]
strict = True
[mypy-torch.*,accelerate.*,diffusers.*,onnx.*,onnxruntime.*,openvino.*,PIL.*,polygraphy.*,rich.*,safetensors.*]
follow_imports = skip
[mypy-click.*,platformdirs.*,psutil.*,skimage.*,transformers.*,triton.*]
follow_imports = skip
"""
CORRECT = """
from pathlib import Path
from typing import assert_type

import numpy as np
import numpy.typing as npt

from pfstorer_rt import Base, Identity, Plan, RestoreConfig, Restorer, load_base, personalize
from pfstorer_rt.export import export_plan

base = load_base("portrait")
assert_type(base, Base)
identity = personalize("alice", [Path("alice.jpg")], base)
assert_type(identity, Identity)
assert_type(identity.name, str)
plan = export_plan("alice.plan", identity, base)
assert_type(plan, Plan)
with Restorer.from_plan(plan.path) as restorer:
    assert_type(restorer, Restorer)
    result = restorer.restore(np.zeros((8, 8, 3), np.float32), RestoreConfig(steps=1))
    assert_type(result, npt.NDArray[np.float32])
for source in (base, "portrait", Path("portrait")):
    assert_type(Restorer.from_base(source, identity), Restorer)
reveal_type(Restorer.restore)
reveal_type(personalize)
"""
WRONG = """
from pfstorer_rt import Identity, RestoreConfig, Restorer
from pfstorer_rt import Restore  # attr-defined

Restorer.from_base(3)  # arg-type
RestoreConfig(step=1)  # call-arg
number: int = Identity.load("alice.safetensors").name  # assignment
"""


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Function text -> (status, output) of `mypy --strict` on a script that uses the installed package."""
    site = tmp_path_factory.mktemp("site")
    package = site / "pfstorer_rt"
    package.mkdir()
    for path in (ROOT / "pfstorer_rt").iterdir():
        (package / path.name).symlink_to(path)
    (package / "export").symlink_to(ROOT / "export")
    (package / "kernels").symlink_to(ROOT / "kernels" / "ops")
    folder = tmp_path_factory.mktemp("consumer")
    (folder / "mypy.ini").write_text(SETTINGS)

    def run(text):
        (folder / "script.py").write_text(text)
        command = [sys.executable, "-m", "mypy", "--python-version", "3.11", "script.py"]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_public_names_have_their_real_types(check):
    status, output = check(CORRECT)
    assert status == 0, output
    revealed = [line for line in output.splitlines() if "Revealed type" in line]
    assert len(revealed) == 2 and not any('"Any"' in line or "-> Any" in line for line in revealed), output
    assert "pfstorer_rt.config.RestoreConfig | None" in revealed[0]
    assert "-> pfstorer_rt.identity.Identity" in revealed[1]


def test_wrong_uses_are_reported(check):
    status, output = check(WRONG)
    assert status == 1
    for number, line in enumerate(WRONG.splitlines(), 1):
        code = line.partition("# ")[2]
        assert not code or any(
            f":{number}: error" in shown and f"[{code}]" in shown for shown in output.splitlines()
        ), line


def test_type_checkers_and_python_see_the_same_names():
    tree = ast.parse((ROOT / "pfstorer_rt" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == pfstorer_rt._MODULES and set(pfstorer_rt.__all__) == set(typed)
    for name, module in typed.items():
        assert getattr(pfstorer_rt, name).__module__ == module, name
    with pytest.raises(AttributeError, match="Restore"):
        pfstorer_rt.Restore  # noqa: B018
