"""The demo as one call of the library, on a nano base and without a command line."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from pfstorer_rt.demo import IMAGES, TRUTH, DemoConfig, reference_files, run_demo
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.identity import Identity
from pfstorer_rt.imaging.similarity import psnr
from pfstorer_rt.plan import Plan


@pytest.fixture
def quick_export(monkeypatch, nano_plan):
    """`export_plan` copies the shared nano plan; returns the identities and bases that it was called with."""
    calls = []

    def export_plan(output, identity, base):
        calls.append((identity, base))
        shutil.copyfile(nano_plan.path, output)
        return Plan.open(output)

    monkeypatch.setattr("pfstorer_rt.export.export_plan", export_plan)
    return calls


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, np.float32) / 255


def test_the_demo_writes_every_file_and_measures_its_images(tmp_path, quick_export, nano_base_dir):
    notes, stages = [], []
    config = DemoConfig(nano_base_dir, iterations=2)
    report = run_demo(tmp_path / "demo", config, notes.append, stages.append)
    assert [image.name for image in report.images] == ["input", "base", "personalized", TRUTH]
    truth = pixels(report.images[-1].file)
    for image in report.images[:-1]:
        assert image.psnr == pytest.approx(psnr(pixels(image.file), truth), abs=0.05), image.name
    assert report.images[-1].psnr is None and report.images[-1].id_distance == 0
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == report.figures
    (identity, base), written = quick_export[0], Identity.load(tmp_path / "demo" / "nobody.safetensors")
    assert written.fingerprint == identity.fingerprint and identity.base_fingerprint == base.fingerprint
    assert len(identity.references) == 5 and report.plan == tmp_path / "demo" / "nobody.plan"
    assert (stages[-1].stage, stages[-1].done) == ("personalize nobody", 2)
    assert len(notes) == 2 and str(report.plan) in notes[1]
    with Image.open(report.side_by_side) as sheet:
        assert sheet.width > 4 * 288


def test_the_original_is_no_reference_and_shows_the_same_person():
    from pfstorer_rt.faces.dlib import SAME_PERSON, identity_distance
    from pfstorer_rt.faces.finding import face_embedder

    embed, original = face_embedder(), pixels(IMAGES / "original.jpg")
    assert original.shape == (512, 512, 3) and len(reference_files()) == 5
    for file in reference_files():
        other = pixels(file)
        assert psnr(other, original) < 25
        assert identity_distance(embed(other), embed(original)) < SAME_PERSON


def test_without_an_extra_nothing_is_written(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pfstorer_rt.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingBackendError, match="demo needs the all extra"):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
