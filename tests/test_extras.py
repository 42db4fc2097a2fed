"""The runtime without extras, as `pip install pfstorer-rt` installs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt import extras
from pfstorer_rt.errors import MissingBackendError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {
    "dlib": "dlib-bin",
    "onnx_ir": "onnxscript",
    "pillow_heif": "pillow-heif",
    "skimage": "scikit-image",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "uvicorn": "gradio",
}
"""Import name -> the requirement that brings it, where the two differ."""

RUN = '''
import contextlib, importlib.machinery, io, json, sys

blocked = set(sys.argv[1].split())

class PathFinder(importlib.machinery.PathFinder):
    """Finds no package that is blocked, as where it is not installed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = PathFinder
from pfstorer_rt.cli import main

results = []
for arguments in json.load(sys.stdin):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as error:
            status = error.code or 0
    results.append([status, out.getvalue(), err.getvalue()])
import pfstorer_rt
try:
    pfstorer_rt.personalize
except pfstorer_rt.PFStorerError as error:
    library = f"{type(error).__name__}: {error}"
print(json.dumps({"results": results, "library": library, "imported": sorted(blocked & sys.modules.keys())}))
'''


@pytest.fixture(scope="module")
def runtime_alone():
    """Function (list of commands) -> their results, in a process that cannot import the packages of any extra."""

    def run(commands, home):
        blocked = " ".join(package for packages in extras.EXTRAS.values() for package in packages)
        environment = {**os.environ, "PFSTORER_HOME": str(home), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", RUN, blocked],
            input=json.dumps([[str(word) for word in command] for command in commands]),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_commands_without_their_extra_name_the_extra(runtime_alone, tmp_path, nano_plan, nano_identity, make_image):
    home, image, out = tmp_path / "home", tmp_path / "old.png", tmp_path / "out"
    out.mkdir()
    nano_identity.save(home / "identities" / "alice.safetensors")
    Image.fromarray((make_image(50, 40) * 255).astype(np.uint8)).save(image)
    restore = ("restore", "--engine", nano_plan.path, image, "--steps", 1)
    works = [
        (*restore, "-o", out / "restored.png"),
        ("bench", "--engine", nano_plan.path, "--steps", 1, "--runs", 2, "--seconds", 0, "--size", 64),
        ("inspect", nano_plan.path),
        ("identities", "list"),
        ("doctor",),
    ]
    needs = {
        "degrade needs the torch extra": ("degrade", image, "-o", out / "bad.png"),
        "inspect needs the torch extra": ("inspect", "portrait"),
        "identities needs the torch extra": ("identities", "show", "alice"),
        "personalize needs the train extra": ("personalize", "--identity", "bob", image),
        "train-base needs the train extra": ("train-base", image, "-o", out / "base"),
        "import-base needs the train extra": ("import-base", image, "-o", out / "base"),
        "a base in PyTorch needs the train extra": ("restore", "--base", "portrait", image, "-o", out / "no.png"),
        "sampler unipc needs the train extra": (*restore, "--sampler", "unipc", "-o", out / "no.png"),
        "export needs the export extra": ("export", "--base", "portrait", "-o", out / "no.plan"),
        "demo needs the all extra": ("demo", "-o", out / "demo"),
    }
    report = runtime_alone([*works, *needs.values()], home)
    assert report["imported"] == []
    done, refused = report["results"][: len(works)], report["results"][len(works) :]
    for command, (status, text, errors) in zip(works, done, strict=True):
        assert status == 0 and text, (command, errors)
    for message, (status, text, errors) in zip(needs, refused, strict=True):
        line = f"Error: {message}: pip install 'pfstorer-rt[{message.split()[-2]}]'\n"
        assert (status, text, errors) == (2, "", line)
    assert report["library"].startswith("MissingBackendError: personalize needs the train extra: pip install")
    with Image.open(out / "restored.png") as result:
        assert result.size == (40, 50)
    assert sorted(p.name for p in out.iterdir()) == ["restored.png"]


def requirements(extra):
    """The names of an extra's requirements, including the extras in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = set()
    for text in project[extra]:
        if own := re.fullmatch(r"pfstorer-rt\[(.*)\]", text):
            names |= {name for part in own[1].split(",") for name in requirements(part)}
        else:
            names.add(re.split(r"[<>=;\[ ]", text)[0])
    return names


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_each_extra_contains_its_packages(extra):
    wanted = {DISTRIBUTIONS.get(package, package) for package in extras.EXTRAS[extra]}
    assert wanted <= requirements(extra)


def test_the_extra_all_contains_every_package_without_a_gpu():
    wanted = {p for extra, packages in extras.EXTRAS.items() if extra not in ("gpu", "tensorrt") for p in packages}
    assert {DISTRIBUTIONS.get(package, package) for package in wanted} <= requirements("all")


def test_a_missing_package_outside_the_extras_is_not_explained():
    with pytest.raises(ModuleNotFoundError), extras.needed_by("anything"):
        raise ModuleNotFoundError("No module named 'numpie'", name="numpie")
    message = r"^reading needs the openvino extra: pip install 'pfstorer-rt\[openvino\]'$"
    with pytest.raises(MissingBackendError, match=message), extras.needed_by("reading"):
        raise ModuleNotFoundError("No module named 'openvino.sub'", name="openvino.sub")
