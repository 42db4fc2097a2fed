"""The locked packages cover the dependencies of the project and agree with the constraints."""

import json
import re
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNLOCKED = {"setuptools", "torch", "triton"}
"""Packages that `make setup` installs before the lock; torch and triton have several builds of one version."""


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    """{name: [(version, marker, number of hashes)]} of the lock."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text()):
        name, version, marker = re.match(r"([\w.-]+)==(\S+)(?: ; (.*?))? \\", entry).groups()
        hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry)
        found.setdefault(plain(name), []).append((version, marker or "", len(hashes)))
    return found


def test_every_dependency_is_locked_with_hashes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, names, pending = project["optional-dependencies"], set(), [project["dependencies"]]
    pending += [extras["all"], extras["dev"]]
    while pending:
        for text in pending.pop():
            if inner := re.match(r"pfstorer-rt\[(.*)\]", text):
                pending += [extras[extra] for extra in inner[1].split(",")]
            else:
                names.add(plain(re.match(r"[\w.-]+", text)[0]))
    lock = locked()
    assert names - UNLOCKED <= set(lock) and len(names) > 30 and not UNLOCKED & set(lock)
    assert all(hashes for entries in lock.values() for _, _, hashes in entries)


def test_the_constraints_are_those_of_the_lock():
    lock = locked()
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 40
    for line in lines:
        name, version = re.match(r"([\w.-]+)==([^;\s]+)", line).groups()
        if plain(name) in lock:
            assert version in [entry[0] for entry in lock[plain(name)]], line


def test_the_list_of_packages_has_the_locked_versions():
    components = json.loads((ROOT / "sbom.json").read_text())["components"]
    versions, lock = {plain(c["name"]): c["version"] for c in components}, locked()
    assert len(versions) > 70
    for name, version in versions.items():
        assert name in UNLOCKED or name not in lock or version in [entry[0] for entry in lock[name]], name


@pytest.mark.parametrize("status", [0, 1])
def test_an_audit_without_an_answer_for_every_package_fails_in_one_line(tmp_path, status):
    """`pip-audit` leaves out packages about which PyPI does not answer, unless it is strict."""
    tool = tmp_path / "pip-audit"
    tool.write_text(f'#!/bin/sh\necho "$@"\nexit {status}\n')
    tool.chmod(0o755)
    command = ["make", "-s", "-C", ROOT, "-o", ".cache/tools/ready", "audit", f"TOOLS={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "--strict" in done.stdout.split() and (done.returncode == 0) == (status == 0)
    assert done.stderr.startswith("audit failed: ") == bool(status)
