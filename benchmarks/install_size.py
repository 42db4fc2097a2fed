"""Measure the install size of the runtime and of each extra, and the imports of the runtime.

Sizes are the sums of the files in the metadata of installed distributions; nothing is downloaded. Imports are counted
by `python -X importtime` in a new process. Its time is processor time, which depends little on other load.

    python benchmarks/install_size.py --engine alice.plan -o benchmarks/results/install_size.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import click
import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

EXTRAS = ("train", "export", "metrics", "openvino", "all")


def required(requirements: Iterable[str], leave_out: str | None = None) -> dict[str, Distribution]:
    """Return the installed distributions that requirements need, at any depth, by name.

    leave_out: a distribution to ignore. Raises `PackageNotFoundError` when a distribution is not installed.
    """
    found: dict[str, Distribution] = {}
    pending, seen = [(text, frozenset[str]()) for text in requirements], set()
    while pending:
        text, active = pending.pop()
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        applies = wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in ("", *active))
        if not applies or name == leave_out or (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        found[name] = distribution(name)
        pending += [(text, frozenset(wanted.extras)) for text in found[name].requires or ()]
    return dict(sorted(found.items()))


def megabytes(distributions: Iterable[Distribution]) -> dict[str, float]:
    """Return the size of each distribution's files in MB, largest first."""
    sizes = {}
    for one in distributions:
        paths = {Path(str(one.locate_file(file))) for file in one.files or () if file.suffix != ".pyc"}
        sizes[one.metadata["Name"]] = round(sum(path.stat().st_size for path in paths if path.is_file()) / 1e6, 2)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def size_of(text: str) -> dict[str, Any]:
    """Return the number and size of the distributions of a requirement, with PyTorch and without it."""
    try:
        brought, without = required([text]), required([text], leave_out="torch")
    except PackageNotFoundError as error:
        return {"not installed here": str(error)}
    sizes = megabytes(brought.values())
    return {
        "distributions": len(brought),
        "mb": round(sum(sizes.values()), 1),
        "mb_without_torch": round(sum(megabytes(without.values()).values()), 1),
        "largest": dict(list(sizes.items())[:12]),
    }


def imports(*arguments: str) -> dict[str, Any]:
    """Run Python with arguments; returns the number of imported modules, processor time in seconds, and packages."""
    before = os.times()
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    lines = [line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:")][1:]
    names = {line[2].strip().partition(".")[0] for line in lines}
    installed = names & set(packages_distributions())  # Python also counts failed imports
    return {
        "modules": len(lines),
        "cpu_seconds": round(seconds, 2),
        "packages": sorted(installed),
    }


@click.command()
@click.option("--engine", required=True, type=click.Path(exists=True, path_type=Path), help="An ONNX plan.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(engine: Path, output: Path) -> None:
    """Measure, and write one JSON file."""
    from common import machine

    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(image)
        restore = ("restore", "--engine", str(engine), "--backend", "onnxruntime", "--steps", "1", str(image))
        imported = {
            "import pfstorer_rt": imports("-c", "import pfstorer_rt"),
            "pfstorer-rt --help": imports("-m", "pfstorer_rt", "--help"),
            "import pfstorer_rt.runtime.restorer": imports("-c", "import pfstorer_rt.runtime.restorer"),
            "pfstorer-rt restore, one picture": imports("-m", "pfstorer_rt", *restore, "-o", f"{folder}/out.png"),
        }
    report = {
        "machine": machine(),
        "installs": {text: size_of(text) for text in ("pfstorer-rt", *(f"pfstorer-rt[{extra}]" for extra in EXTRAS))},
        "imports": imported,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
