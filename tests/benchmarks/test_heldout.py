"""The comparison of bases and a peer on held-out images, and its tables."""

import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from pfstorer_rt.degradation.degrade import degrade

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Function: name of a module in benchmarks/ -> the module."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def heldout(script, monkeypatch, tmp_path, make_image, nano_base_dir):
    """Function: more options -> runs heldout.py on two images with a nano base, and returns the rows of its file."""
    module = script("heldout")
    monkeypatch.setattr(module, "METRICS", ("psnr", "sharpness"))
    (tmp_path / "photos").mkdir()
    for i, (height, width) in enumerate([(70, 64), (61, 80)]):
        pixels = (make_image(height, width, seed=i) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "any.onnx").touch()

    def run(*options):
        fixed = ["--images", tmp_path / "images", "--base", nano_base_dir, "--lpips", tmp_path / "any.onnx"]
        arguments = [f"mine={tmp_path / 'photos'}", "-o", tmp_path / "rows.csv", *fixed, *options]
        done = CliRunner().invoke(module.main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        with (tmp_path / "rows.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_rows_measure_whole_images_at_their_own_size(heldout, script, nano_base_dir, tmp_path):
    rows = heldout("--level", "heavy", "--level", "clean")
    assert [(r["level"], r["picture"], r["method"]) for r in rows] == [
        (level, picture, method)
        for level in ("heavy", "clean")
        for picture in "01"
        for method in ("input", nano_base_dir.name)
    ]
    assert [r["side"] for r in rows[:4]] == ["64", "64", "61", "61"]
    image = script("heldout").read_cases("mine", str(tmp_path / "photos"), ["heavy"], 2)
    original = list(image)[1].original
    expected = peak_signal_noise_ratio(original.numpy(), degrade(original, "heavy", 1001).numpy(), data_range=1)
    assert float(rows[2]["psnr"]) == pytest.approx(expected, abs=0.02)  # the kept result has 8 bits
    assert float(rows[4]["psnr"]) > 50


def test_an_interrupted_run_is_resumed(heldout, script, monkeypatch, tmp_path):
    rows = heldout("--level", "heavy")
    monkeypatch.setattr(script("heldout").Restorer, "from_base", None)  # another restoration would fail
    lines = (tmp_path / "rows.csv").read_text().splitlines(keepends=True)
    (tmp_path / "rows.csv").write_text("".join(lines[:-1]))
    assert heldout("--level", "heavy") == rows


def test_the_peer_gets_the_image_before_its_enlargement(heldout, script, monkeypatch):
    seen = []

    class Network:
        def process_pil(self, image):
            seen.append(image.size)
            return image.resize((image.width * 4, image.height * 4), Image.Resampling.BICUBIC)

    monkeypatch.setattr(script("heldout"), "peer_network", Network)
    rows = heldout("--level", "light", "--level", "clean", "--peer")
    assert seen == [(16, 16), (15, 15)]
    assert [r["level"] for r in rows if r["method"] == "real-esrgan"] == ["light", "light"]
    figures = {r["method"]: float(r["psnr"]) for r in rows[:3]}
    assert figures["real-esrgan"] == pytest.approx(figures["input"], abs=0.5)
