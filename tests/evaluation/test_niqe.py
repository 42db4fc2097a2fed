"""NIQE: the fit, the features, the score and the files of its parameters."""

import numpy as np
import pytest
from scipy.io import savemat
from scipy.stats import gennorm

from pfstorer_rt.errors import BadFileError
from pfstorer_rt.evaluation import niqe as module
from pfstorer_rt.evaluation.registry import MetricFiles, Sample, load_metrics


@pytest.fixture
def photo(face):
    """An image of 288 x 384 pixels: 12 blocks."""
    return np.tile(face, (2, 2, 1))[:288, :384].copy()


@pytest.fixture
def natural(photo):
    """The parameters of a model that was fitted to one image."""
    found = module.block_features(np.round(photo.astype(np.float64) * 255 @ module.LUMA))
    return {"mu": found.mean(0)[None], "cov": np.cov(found, rowvar=False)}


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0])
def test_the_fit_finds_the_shape_and_both_scales(shape):
    values = np.abs(gennorm.rvs(shape, size=400_000, random_state=0))
    sides = np.random.default_rng(1).random(values.size) < 0.25 / (0.25 + 0.5)  # a side's share follows its scale
    found = module.fitted(np.where(sides, -0.25 * values, 0.5 * values))
    assert found[0] == pytest.approx(shape, rel=0.03)
    assert found[2:] == pytest.approx((0.25, 0.5), rel=0.03)
    assert np.isnan(module.fitted(np.zeros((8, 8)))).all()


def test_the_model_of_an_image_gives_it_the_best_score(photo, natural, noisy, tmp_path):
    np.savez(tmp_path / "a.npz", **{f"{name}_pris_param": value for name, value in natural.items()})
    loaded = load_metrics(["niqe"], MetricFiles(niqe=tmp_path / "a.npz"))
    series = [loaded.measure(Sample(noisy(photo, s)), Sample(photo))["niqe"] for s in (0.0, 0.03, 0.1)]
    assert series[0] == pytest.approx(0, abs=0.2)
    assert series == sorted(series) and series[1] > 1


def test_both_kinds_of_files_give_the_same_score(photo, natural, tmp_path):
    np.savez(tmp_path / "a.npz", **{f"{name}_pris_param": value + 0.1 for name, value in natural.items()})
    savemat(tmp_path / "a.mat", {f"{name}_prisparam": value + 0.1 for name, value in natural.items()})
    scores = [module.niqe(photo, module.read_natural_model(tmp_path / name)) for name in ("a.npz", "a.mat")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9) and scores[0] > 0


def test_small_and_flat_images_have_no_score(photo, natural):
    model = module.NaturalModel(natural["mu"].ravel(), natural["cov"])
    assert module.niqe(photo[:191], model) is None
    assert module.niqe(np.full_like(photo, 0.5), model) is None


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.mat").write_text("no parameters")
    np.savez(tmp_path / "other.npz", mu_pris_param=np.zeros(35), cov_pris_param=np.zeros((35, 35)))
    for name in ("text.mat", "other.npz", "absent.npz"):
        with pytest.raises(BadFileError, match=name):
            load_metrics(["niqe"], MetricFiles(niqe=tmp_path / name))
    assert "NIQE" in load_metrics(["niqe"]).refused["niqe"]


def test_halving_averages_and_keeps_constants():
    grey = np.full((96, 192), 120.0)
    assert module.halved(grey).shape == (48, 96)
    np.testing.assert_allclose(module.halved(grey), 120, atol=1e-3)
    ramp = np.tile(np.arange(192.0), (96, 1))
    np.testing.assert_allclose(
        module.halved(ramp)[:, 4:-4], np.tile(np.arange(0.5, 192, 2), (48, 1))[:, 4:-4], atol=0.01
    )
