"""The command that trains the shipped base on a GPU, run on a CPU at nano size, and the tables of its log."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.training.lpips import VGG16
from tests.training.test_one_step import NANO

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
GENERATOR = """
import torch

class Generator:
    def people(self, count, per_person, *, seed, size, variation, truncation, batch):
        return torch.full((count, per_person, 3, size, size), seed % 256, dtype=torch.uint8)

def load(weights, device, dtype):
    assert open(weights).read() == "weights"
    return Generator()
"""
LOG = """\
   29.3s store: 200 people, 282 images/s
    before heavy4 known psnr 26.35 lpips-vgg 0.4109 dlib 0.3662
   41.5s autoencoder 51 l1 0.0397 gradient 0.0575 lpips 0.2510 moments 0.0435 psnr 29.1741 \n\
   91.0s matching 1 loss 0.3165 gamma 0.300
  188.0s joint 201 latent 0.2194 adversarial -0.5195 id_known 0.1303 175/s lr 3.0e-04 people 252
  205.0s saved 44.2 MB, joint 246
joint: 1076 iterations, 68864 samples, 400 s
"""


@pytest.fixture
def script(monkeypatch):
    """Function: name of a module in benchmarks/ -> the module."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def lpips(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for i, (entry, width, side, *_) in enumerate(layer for stage in VGG16 for layer in stage):
        arrays[f"conv{i}.weight"] = rng.standard_normal((width, entry, side, side), np.float32) * (2 / entry / 9) ** 0.5
        arrays[f"conv{i}.bias"] = np.zeros(width, np.float32)
    arrays |= {f"lin{i}": np.ones((1, stage[-1][1], 1, 1), np.float32) for i, stage in enumerate(VGG16)}
    np.savez(tmp_path / "vgg.npz", **arrays)
    return tmp_path / "vgg.npz"


def test_the_command_writes_a_base_with_a_prior(script, lpips, tmp_path, make_image):
    build_base(NANO, seed=1).save(tmp_path / "start")
    for i, name in enumerate(("people/a/1", "people/a/2", "portraits/1", "any/1")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((make_image(144, 144, seed=i) * 255).astype(np.uint8)).save(path)
    (tmp_path / "generator.py").write_text(GENERATOR)
    (tmp_path / "generator.weights").write_text("weights")
    command = ["-o", tmp_path / "made", "--prior", tmp_path / "start", "--lpips", lpips]
    command += ["--people", tmp_path / "people", "--portraits", tmp_path / "portraits", "--photos", tmp_path / "any"]
    command += ["--generator", tmp_path / "generator.py", tmp_path / "generator.weights", "--side", 128]
    command += ["--generated", 3, "--per-person", 2, "--tiles", 2, "--batch", 4, "--iterations", 1, "--workers", 1]
    result = CliRunner().invoke(script("train_portrait").main, [str(word) for word in command], catch_exceptions=False)
    assert result.exit_code == 0 and "is complete" in result.output
    base = load_base(tmp_path / "made")
    assert base.prior is not None and base.fingerprint != load_base(tmp_path / "start").fingerprint


def test_the_printed_log_becomes_tables(script):
    module = script("training_log")
    first, second, third, end = module.steps(LOG, "a GPU")
    assert first["stage"] == "autoencoder" and first["psnr"] == "29.1741" and first["latent"] == ""
    assert second["gamma"] == "0.300" and second["seconds"] == "91.0"
    assert third["adversarial"] == "-0.5195" and third["lr"] == "3.0e-04" and third["samples_per_s"] == "175"
    assert end["iteration"] == "1076" and end["samples_per_s"] == "172"
    (result,) = module.results(LOG, "a GPU")
    assert result["method"] == "known" and result["dlib"] == "0.3662" and result["sf"] == "4"
