import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler
from PIL import Image

from pfstorer_rt.config import PRESETS, TrainConfig
from pfstorer_rt.degradation.degrade import degrade
from pfstorer_rt.diffusion import Schedule, start_from_lq
from pfstorer_rt.errors import SettingError
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.training.base import BaseTrainConfig, latent_batches, latent_pairs, train_base
from pfstorer_rt.training.crops import CropConfig, pair_maker, split_holdout
from pfstorer_rt.training.data import Photographs, read_photo
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.finishing import FinishingConfig
from pfstorer_rt.training.objectives import RestorerObjective
from pfstorer_rt.training.train_stage import train_stage
from pfstorer_rt.training.wrapping import WrappingConfig, add_wrapping

SETTINGS = TrainConfig(iterations=4, batch=2, learning_rate=1e-3, ema=0.5, device="cpu", precision="fp32")
CROPS = CropConfig(holdout=0.0)
CONFIG = BaseTrainConfig("nano", SETTINGS, SETTINGS, CROPS, crop=32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_image):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        Image.fromarray((make_image(70, 66, seed=i) * 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A base trained in one go, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train_base([photos], folder / "base", CONFIG, folder / "work"), folder


def weights(folder):
    return {p.parent.name: safetensors.torch.load_file(p) for p in sorted(folder.glob("*/*.safetensors"))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


def interrupt_after(stage, iterations):
    """A progress callback that interrupts a stage after the given number of iterations."""

    def report(progress):
        if (progress.stage, progress.done) == (stage, iterations):
            os.kill(os.getpid(), signal.SIGINT)

    return report


def test_the_result_is_a_base_directory(whole):
    made, folder = whole
    loaded = load_base(folder / "base")
    assert loaded.fingerprint == made.fingerprint and loaded.config == made.config
    assert set(weights(folder / "base")) == {"unet", "vae", "structure_encoder", "text_encoder"}
    assert {t.dtype for part in weights(folder / "base").values() for t in part.values()} <= {
        torch.float16,
        torch.int64,
    }
    for name, network in loaded.modules().items():
        ours = made.modules()[name].state_dict()
        assert all(torch.equal(v, ours[k]) for k, v in network.state_dict().items()), "what is in memory is on disk"
    image = torch.zeros(1, 3, 64, 64)
    assert loaded.decode(loaded.encode(image)).shape == image.shape


def test_every_network_was_trained(whole):
    made, _ = whole
    start = build_base("nano", CONFIG.restorer.seed)
    for name, network in start.modules().items():
        before, after = network.state_dict(), made.modules()[name].state_dict()
        assert any(not torch.equal(v.half().float(), after[k]) for k, v in before.items()), name


def test_the_logs_have_a_row_for_the_end(whole):
    _, folder = whole
    assert (folder / "work" / "autoencoder.csv").read_text().splitlines()[0] == "iteration,loss,l1,moments"
    for name in ("autoencoder", "restorer"):
        row = (folder / "work" / f"{name}.csv").read_text().splitlines()[-1]
        assert row.startswith("4,") and all(np.isfinite(float(v)) for v in row.split(","))


@pytest.mark.parametrize("stage", ["autoencoder", "restorer"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(photos, whole, tmp_path, stage):
    _, folder = whole
    with pytest.raises(KeyboardInterrupt, match="after iteration 2 of 4"):
        train_base(
            [photos], tmp_path / "base", CONFIG, tmp_path / "work", on_progress=interrupt_after(stage, iterations=2)
        )
    assert not (tmp_path / "base").exists()
    train_base([photos], tmp_path / "base", CONFIG, tmp_path / "work")
    assert same(weights(tmp_path / "base"), weights(folder / "base"))
    assert load_base(tmp_path / "base").fingerprint == load_base(folder / "base").fingerprint


def test_pairs_resume_after_an_interruption(photos, tmp_path):
    paths = sorted(photos.iterdir())

    def pairs(folder, seed=0, config=CONFIG, killed_at=None):
        """Make pairs in chunks of 5; returns them and the numbers of finished pairs that were reported."""
        reports = []

        def report(progress):
            reports.append(progress.done)
            if progress.done == killed_at:
                raise SystemExit("power cut")

        folder.mkdir(exist_ok=True)
        with accelerated(SETTINGS) as accelerator:
            made = latent_pairs(paths, build_base("nano", seed), folder, config, accelerator, report, size=5)
        return np.array(made), reports

    once, reports = pairs(tmp_path / "once")
    assert reports == [0, 5, 10, 12]
    assert once.shape == (12, 2, 4, 8, 8) and np.isfinite(once).all() and once.any((1, 2, 3, 4)).all()
    with pytest.raises(SystemExit):
        pairs(tmp_path / "parts", killed_at=10)
    parts, reports = pairs(tmp_path / "parts")
    assert reports == [10, 12] and np.array_equal(once, parts)
    # Pairs of another base or of other settings replace the old pairs.
    other, reports = pairs(tmp_path / "parts", seed=1)
    assert reports == [0, 5, 10, 12] and not np.array_equal(other, parts)
    assert pairs(tmp_path / "parts", seed=1, config=replace(CONFIG, crops=replace(CROPS, level="light")))[1] == [
        0,
        5,
        10,
        12,
    ]


def test_every_pair_shows_one_photograph_once(photos):
    paths = sorted(photos.iterdir())
    chunk = pair_maker(paths, 64, replace(CROPS, level="light"), 0, 5)(0)
    assert chunk["hq"].shape == chunk["lq"].shape == (5, 3, 64, 64)
    assert not torch.equal(chunk["hq"], chunk["lq"])
    order = [Photographs(paths, 0).order(k) for k in range(12)]
    assert sorted(order) == list(range(12))


def test_mixed_pairs_are_of_both_levels(photos):
    """Every pair is degraded by one of the two levels, after one draw from its generator."""
    paths = sorted(photos.iterdir())
    pairs = pair_maker(paths, 64, replace(CROPS, level="mixed", p_hq=0.0), 0, 12)(0)
    drawn = []
    for k, lq in enumerate(pairs["lq"]):
        candidates = {}
        for name in ("light", "heavy"):
            image, rng = Photographs(paths, 0).crop(k, 64)
            rng.integers(2)
            candidates[name] = degrade(image, name, rng) * 2 - 1
        drawn += [name for name, candidate in candidates.items() if torch.equal(candidate, lq)]
    assert len(drawn) == 12 and 2 <= drawn.count("light") <= 10


def restorer_batches(config, tile=64):
    """The batches of latents that a training of the restorer draws from 12 pairs."""
    base = build_base(replace(PRESETS["nano"], tile=tile))
    pairs = np.random.default_rng(0).standard_normal((12, 2, 4, tile // 8, tile // 8)).astype(np.float16)
    make = latent_batches(pairs, base, config)
    return [make(i, i) for i in range(config.restorer.iterations)]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_first_step_is_the_share_of_samples_at_the_last_timestep(share):
    batches = restorer_batches(replace(CONFIG, first_step=share))
    last = torch.cat([batch["t"] for batch in batches]) == 999
    assert len(last) == 8 and (last.all() if share else not last.any())


def test_the_restorer_trains_on_crops_and_then_on_whole_tiles():
    def sides(config):
        batches = restorer_batches(config, tile=128)
        assert all(batch["hq"].shape == batch["lq"].shape == batch["noise"].shape for batch in batches)
        return [tuple(batch["hq"].shape[-2:]) for batch in batches]

    config = replace(CONFIG, latent_crop=8, cropped=0.5)
    assert sides(config) == [(8, 8)] * 2 + [(16, 16)] * 2
    assert sides(replace(config, latent_crop=32)) == [(16, 16)] * 4, "a crop is not larger than a tile"


def test_training_on_a_prior_changes_only_the_spades_of_its_unet(photos, tmp_path):
    prior = build_base("nano", seed=5)
    before = {n: {k: v.clone().half() for k, v in m.state_dict().items()} for n, m in prior.modules().items()}
    train_base([photos], tmp_path / "base", CONFIG, tmp_path / "work", prior)
    assert not (tmp_path / "work" / "autoencoder.pt").exists()
    after = weights(tmp_path / "base")
    changed = {(n, k) for n in before for k, v in before[n].items() if not torch.equal(v, after[n][k])}
    spades = {("unet", k) for k in before["unet"] if ".spade." in k}
    assert spades and changed & spades
    assert all(n == "structure_encoder" or (n, k) in spades for n, k in changed), changed
    assert any(n == "structure_encoder" for n, _ in changed)


def test_a_prior_can_be_trained_as_a_whole(photos, tmp_path):
    prior = build_base("nano", seed=5)
    before = {k: v.clone().half() for k, v in prior.unet.state_dict().items()}
    vae = {k: v.clone().half() for k, v in prior.vae.state_dict().items()}
    train_base([photos], tmp_path / "base", replace(CONFIG, weights="all"), tmp_path / "work", prior)
    after = weights(tmp_path / "base")
    moved = [k for k in before if not torch.equal(before[k], after["unet"][k])]
    assert any(".spade." in k for k in moved) and any(".attn1." in k for k in moved)
    assert all(torch.equal(v, after["vae"][k]) for k, v in vae.items())


def oracle(base):
    """The same schedule in diffusers."""
    return DDPMScheduler.from_config(base.schedule.to_diffusers(base.config.prediction_type))


class Fixed(torch.nn.Module):
    """A UNet with a fixed prediction, which keeps its inputs."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction, self.inputs = prediction, []

    def forward(self, x, *_):
        self.inputs.append(x)
        return self.prediction


def predicting(kind):
    """A base whose UNet has a fixed prediction of a kind, a batch of three, and the prediction."""
    generator = torch.Generator().manual_seed(0)
    hq, lq, noise, prediction = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(4))
    base = build_base(replace(PRESETS["nano"], prediction_type=kind), seed=5)
    base = replace(base, unet=Fixed(prediction))
    return base, {"hq": hq, "lq": lq, "noise": noise, "t": torch.tensor([1, 400, 950])}, prediction


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x0_weighting_measures_the_clean_latent(kind):
    base, batch, prediction = predicting(kind)
    hq, noise, t = batch["hq"], batch["noise"], batch["t"]
    loss = RestorerObjective(base, "x0")(batch)["loss"]
    errors = []
    for i in range(3):  # diffusers' own solution for x0
        x = oracle(base).add_noise(hq[i : i + 1], noise[i : i + 1], t[i : i + 1])
        step = oracle(base).step(prediction[i : i + 1], int(t[i]), x)
        errors.append((step.pred_original_sample - hq[i]).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_prediction_weighting_measures_what_the_network_predicts(kind):
    base, batch, prediction = predicting(kind)
    hq, noise, t = batch["hq"], batch["noise"], batch["t"]
    loss = RestorerObjective(base)(batch)["loss"]
    target = noise if kind == "epsilon" else oracle(base).get_velocity(hq, noise, t)  # diffusers' own
    torch.testing.assert_close(loss, (prediction - target).square().mean(), rtol=1e-3, atol=0)


def test_samples_at_the_last_timestep_start_as_in_a_restoration():
    base = replace(build_base("nano", seed=5), unet=Fixed(torch.zeros(2, 4, 8, 8)))
    hq, lq, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    RestorerObjective(base)({"hq": hq, "lq": lq, "noise": noise, "t": torch.tensor([999, 998])})
    (x,) = base.unet.inputs
    torch.testing.assert_close(x[0], start_from_lq(lq, noise, Schedule())[0])
    torch.testing.assert_close(x[1:], oracle(base).add_noise(hq[1:], noise[1:], torch.tensor([998])))


def test_a_resumed_training_on_a_prior_gives_the_same_base(photos, tmp_path):
    first = train_base([photos], tmp_path / "a", CONFIG, tmp_path / "wa", build_base("nano", seed=5))
    with pytest.raises(KeyboardInterrupt):
        stop = interrupt_after("restorer", iterations=3)
        train_base([photos], tmp_path / "b", CONFIG, tmp_path / "wb", build_base("nano", seed=5), stop)
    second = train_base([photos], tmp_path / "b", CONFIG, tmp_path / "wb", build_base("nano", seed=5))
    assert first.fingerprint == second.fingerprint and same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_held_out_photographs_depend_only_on_their_names(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(400)]
    train, held = split_holdout(paths, 0.1)
    assert 20 < len(held) < 60 and sorted([*train, *held]) == sorted(paths)
    assert split_holdout(paths[::2], 0.1)[1] == [p for p in paths[::2] if p in set(held)]
    assert split_holdout(paths, 0.0)[1] == []
    assert split_holdout([tmp_path / os.fsdecode(b"caf\xe9.png")], 1.0)[0] == [], "a name that is no text"


@pytest.mark.parametrize(("stage", "config"), [("wrapping", WrappingConfig()), ("finishing", FinishingConfig())])
def test_a_stage_without_its_prior_is_refused_before_any_work(photos, tmp_path, stage, config):
    with pytest.raises(SettingError, match=f"'{stage}' needs a prior") as refusal:
        train_stage([photos], tmp_path / "base", config, tmp_path / "work")
    assert refusal.value.setting == "prior" and not list(tmp_path.iterdir())


def test_wrapping_trains_only_the_fusion_layers(whole, photos, tmp_path):
    base, folder = whole
    config = WrappingConfig(replace(SETTINGS, iterations=6, learning_rate=1e-2), CROPS)
    made = train_stage([photos], tmp_path / "a", config, tmp_path / "work", load_base(folder / "base"))
    again = load_base(tmp_path / "a")
    assert again.fingerprint == made.fingerprint != base.fingerprint and again.config.cfw_weight == 1.0
    before, after = weights(folder / "base"), weights(tmp_path / "a")
    fusion = after.pop("cfw")
    assert same(before, after)
    assert all(float(fusion[f"fusion_layer_{level}.widen.weight"].abs().sum()) > 0 for level in (1, 2))


def test_wrapping_reduces_the_error_of_the_decoder(whole, photos, tmp_path):
    """For inputs without degradation the input is the target, so the wrapped decoder must use it."""
    _, folder = whole
    settings = replace(SETTINGS, iterations=60, batch=4, learning_rate=1e-2, ema=0.0)
    config = WrappingConfig(settings, replace(CROPS, p_hq=1.0))
    base = add_wrapping([photos], load_base(folder / "base"), tmp_path / "a", config, tmp_path / "work")
    image = read_photo(photos / "00.png")[None, :, :64, :64] * 2 - 1
    with torch.no_grad():
        latent = base.encode(image)
        wrapped, plain = base.decode(latent, base.features(image)), base.decode(latent)
    assert (wrapped - image).abs().mean() < 0.7 * (plain - image).abs().mean()
