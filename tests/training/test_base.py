import json
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
from pfstorer_rt.diffusion import Schedule, start_from_lq
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.training import base as module
from pfstorer_rt.training.base import BaseTrainConfig, latent_pairs, split_holdout, train_base
from pfstorer_rt.training.data import read_photo
from pfstorer_rt.training.device import accelerated
from pfstorer_rt.training.objectives import AutoencoderObjective, RestorerObjective
from pfstorer_rt.training.stages import train_stage
from pfstorer_rt.training.wrapping import add_wrapping

SETTINGS = TrainConfig(iterations=4, batch=2, learning_rate=1e-3, ema=0.5, device="cpu", precision="fp32")
CONFIG = BaseTrainConfig(preset="nano", autoencoder=SETTINGS, restorer=SETTINGS, crop=32, variations=1, holdout=0.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_image):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        Image.fromarray((make_image(70, 66, seed=i) * 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of five pairs, so that twelve photographs fill three, the last of them in part."""
    monkeypatch.setattr(module, "PAIR_CHUNK", 5)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A base trained in one go, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAIR_CHUNK", 5)
        return train_base([photos], folder / "base", CONFIG, folder / "work"), folder


def weights(folder):
    return {p.parent.name: safetensors.torch.load_file(p) for p in sorted(folder.glob("*/*.safetensors"))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


def at_call(patch, owner, number, action):
    """Do `action` in the `number`-th call of a method `forward`, counted from 0."""
    real, calls = owner.forward, []

    def forward(self, *arguments):
        if len(calls) == number:
            action()
        calls.append(1)
        return real(self, *arguments)

    patch.setattr(owner, "forward", forward)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


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


@pytest.mark.parametrize("objective", [AutoencoderObjective, RestorerObjective])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(photos, whole, tmp_path, monkeypatch, objective):
    _, folder = whole
    with monkeypatch.context() as patch:
        at_call(patch, objective, 1, interrupt)
        with pytest.raises(KeyboardInterrupt, match="after iteration 2 of 4"):
            train_base([photos], tmp_path / "base", CONFIG, tmp_path / "work")
    assert not (tmp_path / "base").exists()
    train_base([photos], tmp_path / "base", CONFIG, tmp_path / "work")
    assert same(weights(tmp_path / "base"), weights(folder / "base"))
    assert load_base(tmp_path / "base").fingerprint == load_base(folder / "base").fingerprint


def test_pairs_resume_after_an_interruption(photos, whole, tmp_path, monkeypatch):
    _, folder = whole
    expected = np.load(folder / "work" / "pairs.npy")
    assert expected.shape == (12, 2, 4, 8, 8) and np.isfinite(expected).all() and expected.any((1, 2, 3, 4)).all()
    base, paths = build_base("nano", 0), sorted(photos.iterdir())
    made = []
    real = module.pair_maker

    def maker(dying):
        def pair_maker(*arguments):
            make = real(*arguments)

            def chunk(number):
                if dying and number == 2:
                    raise SystemExit("power cut")
                made.append(number)
                return make(number)

            return chunk

        return pair_maker

    def pairs(paths, base, folder, config):
        with accelerated(SETTINGS) as accelerator:
            return latent_pairs(paths, base, folder, config, accelerator)

    monkeypatch.setattr(module, "pair_maker", maker(dying=False))
    once = np.array(pairs(paths, base, whole_folder(tmp_path / "once"), CONFIG))
    monkeypatch.setattr(module, "pair_maker", maker(dying=True))
    with pytest.raises(SystemExit):
        pairs(paths, base, whole_folder(tmp_path / "parts"), CONFIG)
    assert json.loads((tmp_path / "parts" / "pairs.json").read_text())["done"] == 10
    made.clear()
    monkeypatch.setattr(module, "pair_maker", maker(dying=False))
    parts = np.array(pairs(paths, base, tmp_path / "parts", CONFIG))
    assert made == [2] and np.array_equal(once, parts)
    # pairs of another base or of other settings are made anew
    other = np.array(pairs(paths, build_base("nano", 1), tmp_path / "parts", CONFIG))
    assert made == [2, 0, 1, 2] and not np.array_equal(other, parts)
    pairs(paths, build_base("nano", 1), tmp_path / "parts", replace(CONFIG, level="light"))
    assert len(made) == 7


def whole_folder(path):
    path.mkdir()
    return path


def test_every_pair_shows_one_photograph_once(photos):
    base, paths = build_base("nano", 0), sorted(photos.iterdir())
    chunks = [module.pair_maker(paths, base, replace(CONFIG, level="light"), 5)(i) for i in range(3)]
    assert chunks[0]["hq"].shape == chunks[0]["lq"].shape == (5, 3, 64, 64)
    assert not torch.equal(chunks[0]["hq"], chunks[0]["lq"])
    order = [module.Photographs(paths, 0).order(k) for k in range(12)]
    assert sorted(order) == list(range(12))


def test_mixed_pairs_are_of_both_levels(photos, monkeypatch):
    base, paths, drawn = build_base("nano", 0), sorted(photos.iterdir()), []
    monkeypatch.setattr(module, "degrade", lambda image, level, rng: drawn.append(level) or image)
    for chunk in range(4):
        module.pair_maker(paths, base, replace(CONFIG, level="mixed", p_hq=0.25), 5)(chunk)
    light, heavy = (replace(module.LEVELS[name], p_hq=0.25) for name in ("light", "heavy"))
    assert len(drawn) == 20 and all(level in (light, heavy) for level in drawn)
    assert 4 <= drawn.count(light) <= 16


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_first_step_is_the_share_of_samples_at_the_last_timestep(photos, tmp_path, monkeypatch, share):
    seen, real = [], RestorerObjective.forward
    monkeypatch.setattr(RestorerObjective, "forward", lambda self, batch: seen.append(batch["t"]) or real(self, batch))
    train_base([photos], tmp_path / "base", replace(CONFIG, first_step=share), tmp_path / "work", build_base("nano"))
    last = [bool(t == 999) for t in torch.cat(seen)]
    assert all(last) if share else not any(last)


def test_the_restorer_trains_on_crops_and_then_on_whole_tiles(photos, tmp_path, monkeypatch):
    def sides(folder, config):
        seen, real = [], RestorerObjective.forward

        def forward(self, batch):
            assert batch["hq"].shape == batch["lq"].shape == batch["noise"].shape
            seen.append(tuple(batch["hq"].shape[-2:]))
            return real(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(RestorerObjective, "forward", forward)
            prior = build_base(replace(PRESETS["nano"], tile=128))
            train_base([photos], folder / "base", config, folder / "work", prior)
        return seen

    config = replace(CONFIG, latent_crop=8, cropped=0.5)
    assert sides(tmp_path / "a", config) == [(8, 8)] * 2 + [(16, 16)] * 2
    # a square that is larger than the tile is the tile
    assert sides(tmp_path / "b", replace(config, latent_crop=32)) == [(16, 16)] * 4


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
    train_base([photos], tmp_path / "base", replace(CONFIG, trained="all"), tmp_path / "work", prior)
    after = weights(tmp_path / "base")
    moved = [k for k in before if not torch.equal(before[k], after["unet"][k])]
    assert any(".spade." in k for k in moved) and any(".attn1." in k for k in moved)
    assert all(torch.equal(v, after["vae"][k]) for k, v in vae.items())


def oracle(base):
    """The same schedule in diffusers."""
    return DDPMScheduler.from_config(base.schedule.to_diffusers(base.config.prediction_type))


def predicting(kind, monkeypatch):
    """A base whose UNet predicts one fixed thing of a kind, a batch of three for it, and that prediction."""
    base = build_base(replace(PRESETS["nano"], prediction_type=kind), seed=5)
    generator = torch.Generator().manual_seed(0)
    hq, lq, noise, prediction = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(4))
    monkeypatch.setattr(type(base.unet), "forward", lambda *_: prediction)
    return base, {"hq": hq, "lq": lq, "noise": noise, "t": torch.tensor([1, 400, 950])}, prediction


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x0_weighting_measures_the_clean_latent(kind, monkeypatch):
    base, batch, prediction = predicting(kind, monkeypatch)
    hq, noise, t = batch["hq"], batch["noise"], batch["t"]
    loss = RestorerObjective(base, "x0")(batch)["loss"]
    errors = []
    for i in range(3):  # diffusers' own solution for x0
        x = oracle(base).add_noise(hq[i : i + 1], noise[i : i + 1], t[i : i + 1])
        step = oracle(base).step(prediction[i : i + 1], int(t[i]), x)
        errors.append((step.pred_original_sample - hq[i]).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_prediction_weighting_measures_what_the_network_predicts(kind, monkeypatch):
    base, batch, prediction = predicting(kind, monkeypatch)
    hq, noise, t = batch["hq"], batch["noise"], batch["t"]
    loss = RestorerObjective(base)(batch)["loss"]
    target = noise if kind == "epsilon" else oracle(base).get_velocity(hq, noise, t)  # diffusers' own
    torch.testing.assert_close(loss, (prediction - target).square().mean(), rtol=1e-3, atol=0)


def test_samples_at_the_last_timestep_start_as_in_a_restoration(monkeypatch):
    base, seen = build_base("nano", seed=5), []
    hq, lq, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    monkeypatch.setattr(type(base.unet), "forward", lambda self, x, *_: seen.append(x) or torch.zeros_like(x))
    RestorerObjective(base)({"hq": hq, "lq": lq, "noise": noise, "t": torch.tensor([999, 998])})
    torch.testing.assert_close(seen[0][0], start_from_lq(lq, noise, Schedule())[0])
    torch.testing.assert_close(seen[0][1:], oracle(base).add_noise(hq[1:], noise[1:], torch.tensor([998])))


def test_a_resumed_training_on_a_prior_gives_the_same_base(photos, tmp_path, monkeypatch):
    first = train_base([photos], tmp_path / "a", CONFIG, tmp_path / "wa", build_base("nano", seed=5))
    with monkeypatch.context() as patch:
        at_call(patch, RestorerObjective, 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_base([photos], tmp_path / "b", CONFIG, tmp_path / "wb", build_base("nano", seed=5))
    second = train_base([photos], tmp_path / "b", CONFIG, tmp_path / "wb", build_base("nano", seed=5))
    assert first.fingerprint == second.fingerprint and same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_held_out_photographs_depend_only_on_their_names(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(400)]
    train, held = split_holdout(paths, 0.1)
    assert 20 < len(held) < 60 and sorted([*train, *held]) == sorted(paths)
    assert split_holdout(paths[::2], 0.1)[1] == [p for p in paths[::2] if p in set(held)]
    assert split_holdout(paths, 0.0)[1] == []


@pytest.mark.parametrize("stage", ["wrapping", "finishing", "polishing"])
def test_a_stage_that_cannot_start_is_refused_before_any_work(photos, tmp_path, stage):
    with pytest.raises(ValueError, match="needs a prior" if stage != "polishing" else "expected restorer, wrapping"):
        train_stage(stage, [photos], tmp_path / "base", CONFIG, tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_wrapping_trains_only_the_fusion_layers(whole, photos, tmp_path):
    base, folder = whole
    config = replace(CONFIG, restorer=replace(SETTINGS, iterations=6, learning_rate=1e-2))
    made = train_stage("wrapping", [photos], tmp_path / "a", config, tmp_path / "work", load_base(folder / "base"))
    again = load_base(tmp_path / "a")
    assert again.fingerprint == made.fingerprint != base.fingerprint and again.config.cfw_weight == 1.0
    before, after = weights(folder / "base"), weights(tmp_path / "a")
    fusion = after.pop("cfw")
    assert same(before, after)
    assert all(float(fusion[f"fusion_layer_{level}.widen.weight"].abs().sum()) > 0 for level in (1, 2))


def test_wrapping_reduces_the_error_of_the_decoder(whole, photos, tmp_path):
    """On images that were not degraded the LQ image is the answer, so it has to be taken up."""
    _, folder = whole
    settings = replace(SETTINGS, iterations=60, batch=4, learning_rate=1e-2, ema=0.0)
    config = replace(CONFIG, restorer=settings, p_hq=1.0)
    base = add_wrapping([photos], load_base(folder / "base"), tmp_path / "a", config, tmp_path / "work")
    image = read_photo(photos / "00.png")[None, :, :64, :64] * 2 - 1
    with torch.no_grad():
        latent = base.encode(image)
        wrapped, plain = base.decode(latent, base.features(image)), base.decode(latent)
    assert (wrapped - image).abs().mean() < 0.7 * (plain - image).abs().mean()
