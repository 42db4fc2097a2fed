"""Restoring an ONNX plan needs neither PyTorch nor any other package of an extra for training."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from small_plan import small_manifest, small_payloads

from pfstorer_rt.plan import write_plan

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "onnx", "polygraphy", "scipy", "skimage")
RUN = """
import json, sys
from pfstorer_rt.cli import main
try:
    main(sys.argv[2:])
except SystemExit as error:
    assert not error.code, error.code
print(json.dumps([name for name in sys.argv[1].split() if name in sys.modules]))
"""


def imported(*arguments):
    """The heavy packages that one command imports, in a process of its own."""
    command = [sys.executable, "-c", RUN, " ".join(HEAVY), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    payloads = small_payloads()
    return write_plan(tmp_path_factory.mktemp("plan") / "small.plan", small_manifest(payloads), payloads).path


@pytest.fixture
def picture(tmp_path):
    """A colour picture of several tiles with an alpha channel."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 170, 4), np.uint8)).save(tmp_path / "old.png")
    return tmp_path / "old.png"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        ("--steps", 3),
        ("--steps", 2, "--sampler", "ddim", "--eta", 1, "--scale", 1.5, "--compare", "--preview"),
        ("--steps", 3, "--sampler", "dpmpp_2m", "--scale", 0.5, "--tiling", "parity", "--color-fix", "adain"),
    ],
)
def test_restoring_a_plan_imports_no_heavy_package(plan, picture, tmp_path, backend, options):
    result = tmp_path / "new.png"
    found = imported("restore", "--engine", plan, picture, "-o", result, "--backend", backend, *options)
    assert found == [] and Image.open(result).size[0] > 80


@pytest.mark.parametrize("command", [("inspect",), ("bench", "--size", 64, "--runs", 2, "--seconds", 0, "--engine")])
def test_examining_a_plan_imports_no_heavy_package(plan, command):
    assert imported(*command, plan) == []
