"""`pfstorer-rt train-base`: what its options ask the library for."""

from types import SimpleNamespace

import pytest

from pfstorer_rt.training.base import AUTOENCODER, RESTORER, BaseTrainConfig
from pfstorer_rt.training.finishing import FinishingConfig
from pfstorer_rt.training.reptile import ReptileConfig
from pfstorer_rt.training.tile_stages import TileStageConfig
from pfstorer_rt.training.wrapping import WrappingConfig


@pytest.fixture
def asked(run, monkeypatch, tmp_path):
    """Function (*options) -> settings with which the library is called, without any training."""
    calls = []

    def train_stage(sources, out, config, work, prior, on_progress, note):
        calls.append((config, prior, work))
        return SimpleNamespace(config=SimpleNamespace(name="nano"), fingerprint="0" * 64)

    monkeypatch.setattr("pfstorer_rt.training.train_stage.train_stage", train_stage)
    monkeypatch.setattr("pfstorer_rt.models.base.load_base", lambda name: f"base {name}")

    def call(*options):
        done = run("train-base", tmp_path, "-o", tmp_path / "out", *options)
        assert done.status == 0, done.err
        return calls[-1]

    return call


def test_the_default_stage_makes_a_new_base_with_the_defaults_of_the_library(asked, tmp_path):
    config, prior, work = asked("--workers", 0)
    assert (
        config == BaseTrainConfig()
        and config.preset == "portrait"
        and prior is None
        and work == tmp_path / "out.training"
    )


def test_stage_base_has_settings_of_both_networks(asked):
    options = ("--iterations", 5, "--autoencoder-iterations", 7, "--batch", 3, "--learning-rate", 1e-4, "--seed", 2)
    config, prior, _ = asked("--prior", "portrait", "--weights", "all", "--weighting", "x0", "--wide", 1.5, *options)
    assert prior == "base portrait" and (config.weights, config.weighting, config.crops.wide) == ("all", "x0", 1.5)
    assert (config.autoencoder.iterations, config.restorer.iterations) == (7, 5)
    rates = config.autoencoder.learning_rate, config.restorer.learning_rate
    assert rates == (AUTOENCODER.learning_rate, 1e-4)
    assert {(t.batch, t.seed, t.workers) for t in (config.autoencoder, config.restorer)} == {(3, 2, 1)}


def test_the_stage_selects_the_settings(asked):
    wrapping, *_ = asked("--prior", "portrait", "--stage", "wrapping", "--level", "mixed", "--optimizer", "adamw8bit")
    assert isinstance(wrapping, WrappingConfig) and wrapping.crops.level == "mixed"
    assert (wrapping.train.optimizer, wrapping.train.iterations) == ("adamw8bit", RESTORER.iterations)
    chosen = ("--share", 1, "--lambda-face", 3, "--lambda-color", 2, "--p-hq", 0.5)
    finishing, *_ = asked("--prior", "portrait", "--stage", "finishing", *chosen)
    assert isinstance(finishing, FinishingConfig) and finishing.crops.p_hq == 0.5
    weights = (finishing.lambda_face, finishing.lambda_color, finishing.lambda_pixel)
    assert (finishing.share, *weights) == (1, 3, 2, 0.5)
    restorer, *_ = asked("--prior", "portrait", "--stage", "restorer", "--minutes", 2, "--tiles", 20)
    assert isinstance(restorer, TileStageConfig)
    assert (restorer.stage, restorer.tiles, restorer.train["minutes"]) == ("restorer", 20, 2)
    reptile, *_ = asked("--prior", "portrait", "--stage", "reptile", "--iterations", 5, "--optimizer", "adamw8bit")
    assert isinstance(reptile, ReptileConfig) and (reptile.people, reptile.minutes) == (5, 0)
    assert reptile.train["optimizer"] == "adamw8bit"


@pytest.mark.parametrize(
    ("stage", "option"),
    [
        ("wrapping", "--crop=64"),
        ("base", "--minutes=1"),
        ("one-step", "--wide=1.5"),
        ("restorer", "--level=light"),
        ("reptile", "--batch=2"),
    ],
)
def test_an_option_of_another_stage_is_refused(refused, tmp_path, stage, option):
    words = (f"{option.partition('=')[0]} is not an option of the stage {stage}",)
    arguments = ("-o", tmp_path / "out", "--prior", "portrait", "--stage", stage, option)
    refused(2, "train-base", tmp_path, *arguments, words=words)


@pytest.mark.parametrize("stage", ["wrapping", "finishing", "restorer", "one-step", "reptile"])
def test_a_stage_that_continues_a_base_needs_it(refused, tmp_path, stage):
    refused(2, "train-base", tmp_path, "-o", tmp_path / "out", "--stage", stage, words=("--prior",))


def test_a_weight_in_a_stage_on_crops_is_refused(refused, tmp_path):
    (tmp_path / "faces").mkdir()
    words = ("the weight 0.5 belongs to the stages on tiles", f"give {tmp_path}/faces")
    refused(2, "train-base", f"{tmp_path}/faces=0.5", "-o", tmp_path / "out", words=words)


@pytest.mark.parametrize("stage", ["base", "autoencoder"])
def test_a_folder_without_photographs_leaves_no_files(refused, tmp_path, monkeypatch, stage):
    (tmp_path / "empty").mkdir()
    arguments = ("--preset", "nano", "--stage", stage)
    monkeypatch.setattr("pfstorer_rt.console.note", lambda text: None)  # about LPIPS
    refused(2, "train-base", tmp_path / "empty", "-o", tmp_path / "out", *arguments, words=("no images in",))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
