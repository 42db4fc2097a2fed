from dataclasses import replace

import pytest
import torch
from small_sd21 import SMALL_SD21

from pfstorer_rt.config import PRESETS, StructureConfig
from pfstorer_rt.models.structure import SpatialAttention, StructureEncoder


def build(config=SMALL_SD21, seed=0):
    torch.manual_seed(seed)
    return StructureEncoder.from_base_config(config).eval().requires_grad_(False)


def latent(batch=1, height=8, width=8, seed=1):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def test_map_sizes_of_four_levels():
    maps = build()(latent(2), torch.tensor([10.0, 900.0]))
    assert {side: tuple(m.shape) for side, m in maps.items()} == {s: (2, 8, s, s) for s in (8, 4, 2, 1)}


def test_map_sizes_of_sd21():
    with torch.device("meta"):
        encoder = StructureEncoder.from_base_config(PRESETS["sd21"])
        maps = encoder(torch.empty(3, 4, 64, 64), torch.empty(3))
    assert {side: tuple(m.shape) for side, m in maps.items()} == {s: (3, 256, s, s) for s in (64, 32, 16, 8)}


def test_maps_are_keyed_by_width_for_images_that_are_not_square():
    maps = build()(latent(1, 16, 8), torch.tensor([10.0]))
    assert {side: tuple(m.shape[-2:]) for side, m in maps.items()} == {8: (16, 8), 4: (8, 4), 2: (4, 2), 1: (2, 1)}


def test_three_levels_have_attention_everywhere():
    three = StructureConfig(width=8, multipliers=(1, 2, 2), heads=1, out_channels=8, res_blocks=1, norm_groups=4)
    encoder = build(replace(SMALL_SD21, structure=three))
    assert all(isinstance(a, SpatialAttention) for level in encoder.levels for a in level.attentions)
    assert set(encoder(latent(), torch.tensor([1.0]))) == {8, 4, 2}
    four = [isinstance(level.attentions[0], SpatialAttention) for level in build().levels]
    assert four == [True, True, True, False]  # StableSR: attention at downsampling 1, 2, 4


def test_every_map_depends_on_the_timestep_and_the_latent():
    encoder, z, t = build(), latent(), torch.tensor([100.0])
    maps, later, other = encoder(z, t), encoder(z, t + 400), encoder(latent(seed=2), t)
    for side, m in maps.items():
        assert (later[side] - m).abs().max() > 1e-4, side
        assert (other[side] - m).abs().max() > 1e-2, side
    assert all(torch.equal(m, encoder(z, t)[side]) for side, m in maps.items())


def test_rows_do_not_mix():
    encoder, z, t = build(), latent(3), torch.tensor([0.0, 500.0, 999.0])
    together = encoder(z, t)
    for i in range(3):
        alone = encoder(z[i : i + 1], t[i : i + 1])
        for side, m in alone.items():
            assert torch.allclose(m[0], together[side][i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_formula(heads):
    torch.manual_seed(0)
    layer = SpatialAttention(16, heads, 4)
    h = 2 * torch.randn(2, 16, 3, 5) + 1
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    grouped = h.double().reshape(2, 4, -1)
    n = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    tokens = n.reshape(2, 16, 15).transpose(1, 2) * w["norm.weight"] + w["norm.bias"]

    def project(name):
        # The layer's q, k and v may have no bias.
        out = tokens @ w[f"attn.{name}.weight"].T + w.get(f"attn.{name}.bias", 0)
        return out.reshape(2, 15, heads, 16 // heads).permute(0, 2, 1, 3)

    q, k, v = project("to_q"), project("to_k"), project("to_v")
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / (16 // heads) ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    out = torch.einsum("bhij,bhjd->bhid", weights, v).permute(0, 2, 1, 3).reshape(2, 15, 16)
    out = out @ w["attn.to_out.0.weight"].T + w["attn.to_out.0.bias"]
    expected = h.double() + out.transpose(1, 2).reshape(h.shape)
    # The layer itself runs on the processor that the encoder gives it.
    from pfstorer_rt.ops import AttentionProcessor, sdpa

    layer.attn.set_processor(AttentionProcessor(sdpa))
    assert torch.allclose(layer(h).double(), expected, rtol=0, atol=1e-5)  # fp32 against fp64
    assert "attn.to_q.bias" in w  # StableSR's 1x1 convolutions have biases
