import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from skimage.data import astronaut

from pfstorer_rt.config import PRESETS, TrainConfig
from pfstorer_rt.errors import BadFileError, MissingBackendError
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.training.crops import CropConfig
from pfstorer_rt.training.finishing import FinishingConfig, FinishingObjective, finish_base, image_pairs
from pfstorer_rt.training.image_loss import ImageSpaceLoss, face_maps, identity_loss, jitter
from pfstorer_rt.training.wrapping import WrappingConfig, add_wrapping

SETTINGS = TrainConfig(iterations=4, batch=2, learning_rate=1e-3, ema=0.5, device="cpu", precision="fp32")
CROPS = CropConfig(zoom=1.0, wide=1.01, p_hq=1.0, holdout=0.0)
CONFIG = FinishingConfig(SETTINGS, CROPS, first_step=0.5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_image):
    """Five images without a face and one with a face."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        Image.fromarray((make_image(96, 96, seed=i) * 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    Image.fromarray(astronaut()[40:200, 145:305]).save(folder / "face.png")
    return folder


@pytest.fixture(scope="module")
def wrapped(photos, tmp_path_factory):
    """Folder of a base with feature wrapping and v prediction; eps at timestep 999 hardly depends on the image."""
    folder = tmp_path_factory.mktemp("wrapped")
    nano = build_base(replace(PRESETS["nano"], prediction_type="v_prediction"))
    add_wrapping([photos], nano, folder / "base", WrappingConfig(SETTINGS, CROPS), folder / "work")
    return folder / "base"


@pytest.fixture(scope="module")
def finished(photos, wrapped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return finish_base([photos], load_base(wrapped), folder / "base", CONFIG, folder / "work"), folder


def weights(folder):
    return {p.parent.name: safetensors.torch.load_file(p) for p in sorted(folder.glob("*/*.safetensors"))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_all_but_the_autoencoder_is_trained(wrapped, finished):
    made, folder = finished
    assert load_base(folder / "base").fingerprint == made.fingerprint
    before, after = weights(wrapped), weights(folder / "base")
    assert before.keys() == after.keys()
    assert {name for name in before if same(before[name], after[name])} == {"vae"}
    header, *rows = (folder / "work" / "finishing.csv").read_text().splitlines()
    assert header == "iteration,loss,diff,pixel,color,perceptual,id,face" and rows[-1].startswith("4,")


def test_an_interrupted_training_ends_as_an_uninterrupted_one(photos, wrapped, finished, tmp_path):
    def interrupt(progress):
        if (progress.stage, progress.done) == ("finishing", 2):
            os.kill(os.getpid(), signal.SIGINT)

    settings = tmp_path / "base", CONFIG, tmp_path / "work"
    with pytest.raises(KeyboardInterrupt, match="after iteration 2 of 4"):
        finish_base([photos], load_base(wrapped), *settings, interrupt)
    finish_base([photos], load_base(wrapped), *settings)
    ours, theirs = weights(tmp_path / "base"), weights(finished[1] / "base")
    assert all(same(ours[name], theirs[name]) for name in theirs)


def test_the_result_is_between_the_prior_and_the_trained_weights(photos, wrapped, finished, tmp_path):
    whole = replace(CONFIG, share=1.0)
    finish_base([photos], load_base(wrapped), tmp_path / "base", whole, tmp_path / "work")
    start, end, half = (weights(f)["unet"] for f in (wrapped, tmp_path / "base", finished[1] / "base"))
    moved = [k for k in start if not torch.equal(start[k], end[k])]
    assert len(moved) > 50
    for key in moved:
        middle = (start[key].float() + end[key].float()) / 2
        torch.testing.assert_close(half[key].float(), middle, atol=3e-4, rtol=1e-3)


def test_image_pairs_resume_after_an_interruption(photos, wrapped, tmp_path):
    base, paths, reports = load_base(wrapped), sorted(photos.iterdir()), []

    def die(progress):
        if progress.done == 2:
            raise SystemExit("power cut")

    with pytest.raises(SystemExit):
        image_pairs(paths, base, tmp_path, CONFIG, die, size=2)
    images, maps = image_pairs(paths, base, tmp_path, CONFIG, reports.append, size=2)
    assert [report.done for report in reports] == [2, 4, 6]
    assert images.shape == (6, 2, 64, 64, 3) and images.any((1, 2, 3, 4)).all()
    assert maps.shape == (6, 2, 3) and not np.isnan(maps).all((1, 2)).all() and np.isnan(maps).all((1, 2)).sum() == 5


def test_images_without_a_face_have_no_identity_loss(wrapped):
    base = load_base(wrapped)
    identity = partial(identity_loss, ImageSpaceLoss(base, CONFIG).recognizer)
    pixels = np.asarray(Image.fromarray(astronaut()[:256, 96:352]).resize((128, 128)), np.float32) / 255
    face = torch.from_numpy(pixels).permute(2, 0, 1)[None] * 2 - 1
    found = torch.from_numpy(face_maps([pixels]))
    none = torch.full((1, 2, 3), float("nan"))
    dark = face * 0.3
    alone = identity(dark, face, found)
    assert alone > 0.001 and identity(face, face, found) < 1e-8
    pair = identity(torch.cat([dark, -face]), torch.cat([face, face]), torch.cat([found, none]))
    torch.testing.assert_close(pair, alone)
    assert identity(dark, face, none) == 0


def test_finishing_reduces_its_losses(photos, wrapped, tmp_path):
    """For inputs without degradation the target is the input, so the losses must decrease."""
    settings = replace(SETTINGS, iterations=50, batch=4, learning_rate=4e-3, ema=0.0)
    config = replace(CONFIG, train=settings, first_step=1.0, share=1.0)
    finish_base([photos], load_base(wrapped), tmp_path / "base", config, tmp_path / "work")
    rows = np.loadtxt(tmp_path / "work" / "finishing.csv", delimiter=",", skiprows=1)
    first, last = finishing_losses(photos, wrapped, tmp_path), finishing_losses(photos, tmp_path / "base", tmp_path)
    assert np.isfinite(rows).all()
    assert last["diff"] < 0.2 * first["diff"] and last["perceptual"] < 0.9 * first["perceptual"], (first, last)


def finishing_losses(photos, folder, work):
    """Return the losses of a base on the six images of `work`, at timestep 999."""
    base, images = load_base(folder), np.load(work / "work" / "images.npy")
    objective = FinishingObjective(base, CONFIG)
    hq, lq = torch.from_numpy(images).permute(1, 0, 4, 2, 3).float() / 127.5 - 1
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = torch.from_numpy(np.load(work / "work" / "maps.npy"))
    with torch.no_grad():
        t, corner = torch.full((6,), 999), torch.zeros(2, dtype=torch.long)
        return objective({"hq": hq, "lq": lq, "noise": noise, "t": t, "maps": maps, "corner": corner})


def test_jitter_is_a_small_similarity_transform():
    matrices = jitter(500, np.random.default_rng(0))
    turn = matrices[:, :2, :2]
    scale = np.sqrt(np.linalg.det(turn))
    np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), scale[:, None, None] ** 2 * np.eye(2)[None], atol=1e-9)
    assert 0.9 < scale.min() < 0.96 and 1.04 < scale.max() < 1.1
    assert 0.04 < np.abs(matrices[:, :2, 2]).max() <= 0.06


def test_finishing_needs_feature_wrapping_and_the_metrics_extra(photos, wrapped, tmp_path, without_dlib):
    with pytest.raises(BadFileError, match="no feature wrapping; train it first"):
        finish_base([photos], build_base("nano"), tmp_path / "a", CONFIG, tmp_path / "work")
    with pytest.raises(MissingBackendError, match="pip install"):
        finish_base([photos], load_base(wrapped), tmp_path / "a", CONFIG, tmp_path / "work")
