from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pfstorer_rt.config import PRESETS, StructureConfig, TrainConfig
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.training.latents import flip
from pfstorer_rt.training.lpips import Lpips
from pfstorer_rt.training.one_step import OneStepConfig, OneStepObjective, WindowSampler, finish_in_one_step
from pfstorer_rt.training.tile_restorer import TileRestorerConfig, train_tile_restorer

NANO = replace(
    PRESETS["portrait"],
    name="nano-portrait",
    tile=128,
    head_size=8,
    spade_hidden=8,
    unet={
        **PRESETS["portrait"].unet,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16, 16),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    },
    structure=StructureConfig(width=8, multipliers=(1, 1, 2), heads=1, out_channels=8, res_blocks=1, norm_groups=4),
    vae={
        "class": "PatchAutoencoder",
        "patch": 4,
        "widths": (8, 8, 8),
        "encoder_blocks": (1, 1, 1),
        "decoder_blocks": (1, 1, 1),
        "latent_channels": 4,
    },
    text=PRESETS["nano"].text,
    cfw={"levels": (2, 3), "widths": (8, 8), "growth": 4, "patch": 4},
)
TRAIN = TrainConfig(iterations=3, batch=2, learning_rate=1e-3, precision="fp32")


@pytest.fixture
def base():
    return build_base(NANO, seed=1)


@pytest.fixture
def lpips(random_lpips):
    return random_lpips


@pytest.fixture
def pool():
    rng = np.random.default_rng(0)
    hq = rng.integers(0, 256, (6, 128, 128, 3), np.uint8)
    lq = np.stack([hq // 2, 255 - hq], 1)
    maps = np.tile(np.array([[0.3, 0, -0.4], [0, 0.3, 0.2]], np.float32), (6, 1, 1))
    maps[3] = np.nan
    return {"hq": hq, "lq": lq, "maps": maps}


def latents_of(base, pool):
    def encode(pixels):
        images = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        return base.encode(images).numpy()

    versions = [[encode(flip(pool["hq"], v)), encode(flip(pool["lq"][:, v], v))] for v in range(2)]
    return np.array(versions).transpose(2, 0, 1, 3, 4, 5)


def batches(base, pool, config, count=12):
    sampler = WindowSampler(pool, latents_of(base, pool), config)
    return [sampler(number) for number in range(count)]


def test_windows_show_the_image_of_their_latents(base, pool):
    """The encoded window equals its latents away from the border."""
    config = OneStepConfig(train=TRAIN, window=4, crop=7, cropped=0.5, on_faces=0.5)
    for batch in batches(base, pool, config):
        y, x = batch["corner"].tolist()
        h = base.vae.encoder.conv_in(F.pixel_unshuffle(batch["hq_window"], 4))
        assert batch["hq_window"].shape == batch["lq_window"].shape == (2, 3, 96, 96)
        assert 0 <= y <= batch["hq"].shape[-2] - 6 and 0 <= x <= batch["hq"].shape[-1] - 6
        assert h.shape[-1] == 24
    plain = replace(NANO, vae={**NANO.vae, "encoder_blocks": (0, 0, 0)})
    patches = build_base(plain, seed=1)
    for convolution in (*patches.vae.encoder.downsamplers, patches.vae.encoder.conv_in, patches.vae.encoder.conv_out):
        convolution.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # 1x1 in a 3x3
    for batch in batches(patches, pool, config):
        y, x = batch["corner"].tolist()
        for kind in ("hq", "lq"):
            of_window = patches.encode(batch[f"{kind}_window"])
            torch.testing.assert_close(of_window, batch[kind][..., y : y + 6, x : x + 6], atol=1e-4, rtol=1e-3)


def test_batches_depend_on_their_number_alone(base, pool):
    config = OneStepConfig(train=TRAIN, window=4, crop=8)
    sampler = WindowSampler(pool, latents_of(base, pool), config)
    first, again = sampler(5), sampler(5)
    assert all(torch.equal(first[name].nan_to_num(), again[name].nan_to_num()) for name in first)
    assert not torch.equal(first["hq"], sampler(6)["hq"])


def test_a_share_of_the_iterations_has_clean_inputs(base, pool):
    def clean(batch):
        return [torch.equal(batch[name.replace("lq", "hq")], batch[name]) for name in batch if name.startswith("lq")]

    settings = {"train": TRAIN, "window": 4, "cropped": 0.5}
    found = [clean(batch) for batch in batches(base, pool, OneStepConfig(clean=0.5, **settings), 16)]
    assert all(len(set(same)) == 1 for same in found), "latents, windows and tiles of one iteration agree"
    assert 0 < sum(same[0] for same in found) < 16
    assert not any(any(clean(batch)) for batch in batches(base, pool, OneStepConfig(clean=0.0, **settings)))


def test_whole_tiles_have_face_maps(base, pool):
    found = batches(base, pool, OneStepConfig(train=TRAIN, window=4, cropped=0.0), 20)
    assert all(b["hq_tile"].shape == (1, 3, 128, 128) and b["hq"].shape[-1] == 8 for b in found)
    sides = {round(float(b["maps"][0, 0, 2]) * 2) for b in found if b["maps"].isfinite().all()}
    assert sides == {-1, 1}, "the faces of flipped tiles are flipped"


def objective(base, lpips, **settings):
    torch.manual_seed(0)
    made = OneStepObjective(base, OneStepConfig(train=TRAIN, window=4, **settings), Lpips(lpips), None)
    torch.nn.init.normal_(made.discriminator.heads[0][-1].weight)
    for module in (base.unet, base.cfw, base.vae.decoder, base.structure_encoder):
        module.requires_grad_(True)
    return made


def test_discriminator_and_restorer_have_separate_gradients(base, pool, lpips):
    made = objective(base, lpips)
    (batch,) = batches(base, pool, made.config, 1)
    losses = made(batch)
    losses["adversarial"].backward(retain_graph=True)
    assert all(p.grad is None for p in made.discriminator.parameters())
    assert base.vae.decoder.conv_out.weight.grad.abs().sum() > 0
    base.vae.decoder.zero_grad()
    losses["discriminator"].backward()
    assert base.vae.decoder.conv_out.weight.grad is None
    assert made.discriminator.heads[0][-1].weight.grad.abs().sum() > 0


def test_the_loss_is_the_weighted_sum(base, pool, lpips):
    made = objective(base, lpips, lambda_pixel=2.0, lambda_adversarial=0.5)
    (batch,) = batches(base, pool, made.config, 1)
    found = {name: value.item() for name, value in made(batch).items()}
    expected = 0.2 * found["latent"] + 2 * found["pixel"] + found["perceptual"] + 0.5 * found["adversarial"]
    expected += found["discriminator"] + 0.8 * found["id"] + 0.5 * found["eyes"] + 4 * found["repeated"]
    expected += 1.5 * found["color"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["repeated"] > 0 and found["color"] > 0


def test_the_eyes_of_a_whole_tile_have_their_own_loss(base, pool, lpips, monkeypatch):
    """A strip that is 0.1 too bright costs L1 0.1; the rest of the tile is as in the original."""
    made = objective(base, lpips)
    batch = next(b for b in batches(base, pool, replace(made.config, cropped=0.0), 9) if b["maps"].isfinite().all())
    monkeypatch.setattr(made.lpips, "between", lambda *_: torch.zeros(1))
    tile = batch["hq_tile"]

    def difference(top, bottom):
        """The loss when a part of the face's square, in units of half its side, is brighter."""
        square = batch["maps"][0].double().numpy()
        corners = np.array([[x, y, 1] for x in (-0.6, 0.6) for y in (top, bottom)]) @ square.T
        pixels = ((np.sort(corners, 0) + 1) / 2 * tile.shape[-1]).round().astype(int)
        (left, low), (right, high) = pixels[[0, -1]]
        brighter = tile.clone()
        brighter[..., low:high, left:right] += 0.1
        return made.difference_of_eyes(brighter, tile, batch["maps"]).item()

    assert difference(-0.6, -0.15) == pytest.approx(0.1, abs=0.02)
    assert difference(0.0, 0.6) == 0


def test_a_base_is_trained_in_three_parts_and_shipped(base, pool, lpips, tmp_path):
    encoder = {name: value.clone() for name, value in base.vae.encoder.state_dict().items()}
    before = base.vae.decoder.conv_out.weight.clone()
    train_tile_restorer(pool, base, tmp_path / "restorer", TileRestorerConfig(train=TRAIN, crop=4))
    config = OneStepConfig(train=TRAIN, window=4, crop=8)
    finish_in_one_step(pool, base, tmp_path / "one", config, lpips, None)
    assert all(torch.equal(value, encoder[name]) for name, value in base.vae.encoder.state_dict().items())
    assert not torch.equal(base.vae.decoder.conv_out.weight, before)
    log = (tmp_path / "one" / "one_step.csv").read_text()
    assert log.startswith("iteration,loss,latent,pixel,color,perceptual,adv")
    base.save(tmp_path / "base", torch.float16)
    assert load_base(tmp_path / "base").fingerprint == base.fingerprint


def test_finishing_needs_feature_wrapping(pool, lpips, tmp_path):
    plain = build_base(replace(NANO, cfw=None))
    with pytest.raises(BadFileError, match="no feature wrapping"):
        finish_in_one_step(pool, plain, tmp_path, OneStepConfig(train=TRAIN), lpips, None)
