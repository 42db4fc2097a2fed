from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pfstorer_rt.config import PRESETS
from pfstorer_rt.errors import BadFileError
from pfstorer_rt.models.base import build_base, load_base
from pfstorer_rt.models.components import Decoder, Encoder
from pfstorer_rt.models.stablesr.importing import convert_cfw, import_base

GROUPS, WIDTHS, GROWTH, SCALE = 4, (8, 16, 16, 16), 4, 0.18215
KL = {
    **PRESETS["sd21"].vae,
    "block_out_channels": WIDTHS,
    "norm_num_groups": GROUPS,
    "sample_size": 64,
}
CONFIG = replace(PRESETS["nano"], vae=KL, cfw={"widths": WIDTHS[1:3], "growth": GROWTH, "norm_groups": GROUPS})


class Reference:
    """StableSR's autoencoder with feature wrapping, in float64 and from the formulas, under its own tensor names.

    Weights are drawn at their first use, so the names that were used are the checkpoint's.
    """

    def __init__(self, seed):
        self.weights, self.generator = {}, torch.Generator().manual_seed(seed)

    def get(self, name, *shape, fan=1, about=0.0):
        if name not in self.weights:
            drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self.weights[name] = about + drawn * 0.7 / fan**0.5
        return self.weights[name]

    def conv(self, name, x, width, side=3, **more):
        entry = x.shape[1]
        weight = self.get(f"{name}.weight", width, entry, side, side, fan=entry * side * side)
        bias = self.get(f"{name}.bias", width, fan=10)
        return F.conv2d(x, weight, bias, **{"padding": side // 2, **more})

    def norm(self, name, x):
        weight, bias = self.get(f"{name}.weight", x.shape[1], fan=10, about=1.0), self.get(f"{name}.bias", x.shape[1])
        return F.group_norm(x, GROUPS, weight, bias, 1e-6)

    def residual(self, name, x, width, skip="nin_shortcut"):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), width)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), width)
        return h + (x if x.shape[1] == width else self.conv(f"{name}.{skip}", x, width, 1))

    def attention(self, name, x):
        b, c, h, w = x.shape
        n = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{i}", n, c, 1).reshape(b, c, h * w) for i in "qkv")
        weight = (torch.einsum("bci,bcj->bij", q, k) / c**0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weight, v).reshape(x.shape), c, 1)

    def middle(self, name, x):
        x = self.residual(f"{name}.mid.block_1", x, x.shape[1])
        return self.residual(f"{name}.mid.block_2", self.attention(f"{name}.mid.attn_1", x), x.shape[1])

    def encode(self, image):
        h, features = self.conv("encoder.conv_in", image, WIDTHS[0]), {}
        for level, width in enumerate(WIDTHS):
            for i in range(2):
                h = self.residual(f"encoder.down.{level}.block.{i}", h, width)
            features[level] = h
            if level < 3:  # padded only on the right and at the bottom
                h = F.pad(h, (0, 1, 0, 1))
                h = self.conv(f"encoder.down.{level}.downsample.conv", h, width, padding=0, stride=2)
        h = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", self.middle("encoder", h))), 8)
        mean, logvar = self.conv("quant_conv", h, 8, 1).chunk(2, 1)
        return mean * SCALE, (logvar.clamp(-30, 20) / 2).exp() * SCALE, features

    def dense(self, name, x):
        seen = [x]
        for i in range(1, 5):
            seen.append(F.leaky_relu(self.conv(f"{name}.conv{i}", torch.cat(seen, 1), GROWTH), 0.2))
        return x + 0.2 * self.conv(f"{name}.conv5", torch.cat(seen, 1), x.shape[1])

    def fuse(self, name, encoded, x):
        width = x.shape[1]
        h = self.residual(f"{name}.encode_enc_1", torch.cat([encoded, x], 1), width, skip="conv_out")
        for i in range(2):
            r = h
            for j in range(1, 4):
                r = self.dense(f"{name}.encode_enc_2.{i}.rdb{j}", r)
            h = h + 0.2 * r
        return self.residual(f"{name}.encode_enc_3", h, width)

    def decode(self, latent, features, weight):
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", latent / SCALE, 4, 1), WIDTHS[3])
        h = self.middle("decoder", h)
        for level in (3, 2, 1, 0):
            for i in range(3):
                h = self.residual(f"decoder.up.{level}.block.{i}", h, WIDTHS[level])
            if level in (1, 2):
                h = h + weight * self.fuse(f"decoder.fusion_layer_{level}", features[level], h)
            if level > 0:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
                h = self.conv(f"decoder.up.{level}.upsample.conv", h, WIDTHS[level])
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)), 3)


def drawn(seed):
    """A reference whose weights all exist."""
    reference = Reference(seed)
    image = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    reference.decode(torch.zeros(1, 4, 8, 8, dtype=torch.float64), reference.encode(image)[2], 1.0)
    return reference


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A base in place of SD 2.1, on disk."""
    folder = tmp_path_factory.mktemp("sd")
    base = build_base(replace(CONFIG, cfw=None), seed=3)
    return base.save(folder / "sd", torch.float32)


def imported(sd, tmp_path, monkeypatch, vae_seed, cfw_seed):
    """The base imported from checkpoints under StableSR's names; its SPADEs and structure encoder are the base's."""
    from pfstorer_rt.models.stablesr import importing

    base = load_base(sd)
    first = {f"first_stage_model.{k}": v.float() for k, v in drawn(vae_seed).weights.items() if "fusion" not in k}
    first["structcond_stage_model.known_by"] = torch.ones(1)
    torch.save({"state_dict": first}, tmp_path / "stablesr.ckpt")
    whole = {k: v.float() for k, v in drawn(cfw_seed).weights.items()}
    torch.save({"state_dict": whole | {"loss.logvar": torch.ones(())}}, tmp_path / "cfw.ckpt")
    for name in ("convert_unet", "convert_structure_encoder"):
        module = base.unet if name == "convert_unet" else base.structure_encoder
        monkeypatch.setattr(importing, name, lambda *_, m=module: m.state_dict())
    text = base.text_encoder.model.state_dict()
    monkeypatch.setattr(importing, "convert_open_clip_checkpoint", lambda *_, **__: text)
    config = replace(CONFIG, cfw=None)
    files = {"cfw": tmp_path / "cfw.ckpt", "config": config}
    made = import_base(tmp_path / "stablesr.ckpt", tmp_path / "out", None, torch.float32, "epsilon", **files)
    base = load_base(tmp_path / "out")
    assert base.fingerprint == made.fingerprint and base.config == made.config
    return base


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 64, 96, generator=generator, dtype=torch.float64) * 2 - 1


def relative(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("cfw_seed", [1, 2], ids=["the base's autoencoder", "an autoencoder of its own"])
@torch.no_grad()
def test_an_imported_decoder_agrees_with_the_formulas(sd, tmp_path, monkeypatch, cfw_seed):
    base = imported(sd, tmp_path, monkeypatch, 1, cfw_seed)
    assert (base.cfw.autoencoder is None) == (cfw_seed == 1)
    first, wrapped = drawn(1), drawn(cfw_seed)
    image = images()
    mean, std, _ = first.encode(image)
    ours = Encoder(base)(image.float())
    assert relative(ours[0], mean) < 1e-4 and relative(ours[1], std) < 1e-4
    assert relative(base.encode(image.float()), mean) < 1e-4
    features, maps = wrapped.encode(image)[2], base.features(image.float())
    assert all(relative(maps[level], features[level]) < 1e-4 for level in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(ours[2:], maps.values(), strict=True))
    for weight in (0.0, 0.5, 1.0):
        expected = wrapped.decode(mean, features, weight)
        assert relative(base.decode(mean.float(), maps, weight), expected) < 1e-4
        component = Decoder(base)(mean.float(), *ours[2:], torch.tensor([weight]))
        assert relative(component, expected) < 1e-4
    assert relative(base.decode(mean.float()), first.decode(mean, first.encode(image)[2], 0.0)) < 1e-4
    apart = wrapped.decode(mean, features, 0.0) - wrapped.decode(mean, features, 0.5)
    assert apart.abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_weight_0_equals_the_plain_decoder():
    base = build_base(CONFIG, seed=1)
    image = images().float()
    latent = base.encode(image)
    assert torch.equal(base.decode(latent, base.features(image), 0.0), base.decode(latent))


def test_a_checkpoint_without_fusion_layers_is_refused():
    with pytest.raises(BadFileError, match=r"fusion_layer.*vqgan_cfw"):
        convert_cfw({"encoder.conv_in.weight": torch.ones(1)}, {}, CONFIG)


def test_a_base_without_feature_wrapping_refuses_features(nano_base):
    with pytest.raises(ValueError, match="no controllable feature wrapping"):
        nano_base.features(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="no controllable feature wrapping"):
        nano_base.decode(torch.zeros(1, 4, 8, 8), {}, 1.0)


def test_feature_wrapping_is_saved_and_part_of_the_fingerprint(tmp_path):
    base = build_base(CONFIG, seed=1)
    base.save(tmp_path / "a", torch.float32)
    loaded = load_base(tmp_path / "a")
    assert loaded.fingerprint == base.fingerprint and loaded.cfw is not None
    assert all(torch.equal(v, loaded.cfw.state_dict()[k]) for k, v in base.cfw.state_dict().items())
    with torch.no_grad():
        loaded.cfw.fusion_layer_1.encode_enc_1.conv1.bias.add_(1)
    loaded.save(tmp_path / "b", torch.float32)
    assert loaded.fingerprint != base.fingerprint
    replace(loaded, cfw=None, config=replace(CONFIG, cfw=None)).save(tmp_path / "b", torch.float32)
    assert not (tmp_path / "b" / "cfw").exists() and load_base(tmp_path / "b").cfw is None
