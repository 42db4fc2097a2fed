"""The package as `pip install pfstorer-rt` installs it: a wheel, in a fresh environment, run from an empty folder."""

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt import extras

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("install_size", ROOT / "benchmarks" / "install_size.py")
install_size = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install_size)
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "MODEL_LICENSE.md", "pfstorer_rt", "export", "kernels")
FOLDERS = {"pfstorer_rt": "pfstorer_rt", "export": "pfstorer_rt/export", "kernels/ops": "pfstorer_rt/kernels"}


def call(*command, **options):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a copy so that the checkout stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel and exactly the distributions that it requires; returns its bin.

    Nothing is downloaded: the packages of the running environment are linked into the new one.
    """
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    purelib = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    for distribution in install_size.required(requirements).values():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (purelib / name).exists():
                (purelib / name).symlink_to(distribution.locate_file(name))
    return bin_folder


def test_the_wheel_holds_every_file_under_its_installed_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and (
            path.suffix in (".py", ".css", ".html", ".js", ".onnx")
            or path.name == "py.typed"
            or {"bases", "demo_images"} & set(path.parts)
        )
    }
    assert "pfstorer_rt/py.typed" in expected and "pfstorer_rt/export/build.py" in expected
    assert "pfstorer_rt/kernels/reference.py" in expected
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == expected
    licences = {Path(name).name for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "MODEL_LICENSE.md"}


def test_the_requirements_are_complete_without_packages_of_extras(installed, tmp_path):
    check = call(sys.executable, "-m", "pip", "--python", installed / "python", "check", cwd=tmp_path)
    assert "No broken requirements found" in check
    packages = [package for packages in extras.EXTRAS.values() for package in packages]
    code = f"import importlib.util as i; print(*[name for name in {packages} if i.find_spec(name)])"
    assert call(installed / "python", "-c", code, cwd=tmp_path).split() == []


def test_what_is_imported_is_the_wheel(installed, tmp_path):
    code = """
import pfstorer_rt, pfstorer_rt.runtime.restorer, pfstorer_rt.kernels, importlib.util
print(*(m.__file__ for m in (pfstorer_rt, pfstorer_rt.runtime.restorer, pfstorer_rt.kernels)), sep="\\n")
assert importlib.util.find_spec("export") is None, "a top-level name that is not ours to take"
"""
    files = call(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert len(files) == 3 and all(Path(f).is_relative_to(installed.parent) for f in files), files


def test_the_installed_command_restores_an_image(installed, tmp_path, nano_plan, make_image):
    environment = {**os.environ, "PFSTORER_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    folder = tmp_path / "empty"
    folder.mkdir()
    command = installed / "pfstorer-rt"
    assert "restore" in call(command, "--help", cwd=folder, env=environment)
    assert call(command, "--version", cwd=folder, env=environment).startswith("pfstorer-rt, version ")
    Image.fromarray((make_image(50, 40) * 255).astype(np.uint8)).save(tmp_path / "old.png")
    shutil.copy(nano_plan.path, tmp_path / "alice.plan")
    words = ("restore", "--engine", tmp_path / "alice.plan", tmp_path / "old.png", "-o", "restored.png", "--steps", 1)
    assert "restored.png: 40x50" in call(command, *words, cwd=folder, env=environment)
    with Image.open(folder / "restored.png") as result:
        result.load()
        assert result.size == (40, 50)
    assert [p.name for p in folder.iterdir()] == ["restored.png"]
    assert not (tmp_path / "home").exists()
