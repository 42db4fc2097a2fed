import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from small_sd21 import SMALL_SD21
from torch import nn

from pfstorer_rt.config import PRESETS, StructureConfig
from pfstorer_rt.models.personalization import build_blocks
from pfstorer_rt.models.structure import StructureEncoder
from pfstorer_rt.models.unet import RestorationUNet, Spade, to_map, to_tokens

# tiny's topology (three levels, attention everywhere, one block a level) at nano's widths.
THREE_LEVELS = replace(
    SMALL_SD21,
    unet={
        **PRESETS["tiny"].unet,
        "block_out_channels": (8, 16, 16),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
        "in_channels": 4,
        "out_channels": 4,
    },
    structure=StructureConfig(width=8, multipliers=(1, 2, 2), heads=1, out_channels=8, res_blocks=1, norm_groups=4),
)
CONFIGS = {"small SD 2.1": SMALL_SD21, "three levels": THREE_LEVELS}


class WithoutSpade(nn.Module):
    """Stands in for a Spade that changes nothing."""

    def forward(self, h, structure):
        return h


def build(config, seed=0):
    torch.manual_seed(seed)
    return RestorationUNet.from_base_config(config).eval().requires_grad_(False)


def inputs(config, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    side = config.latent_tile
    x = torch.randn(batch, config.latent_channels, side, side, generator=generator)
    context = torch.randn(batch, 5, config.unet["cross_attention_dim"], generator=generator)
    channels, levels = config.structure.out_channels, len(config.unet["block_out_channels"])
    sides = [side >> i for i in range(levels)]
    maps = {s: torch.randn(batch, channels, s, s, generator=generator) for s in sides}
    return x, torch.tensor([999.0, 3.0])[:batch], context, maps


def diffusers_twin(unet, config):
    """diffusers' own class and forward, with the same weights."""
    twin = UNet2DConditionModel(sample_size=config.latent_tile, **config.unet)
    twin.load_state_dict({k: v for k, v in unet.state_dict().items() if ".spade." not in k})
    return twin.eval()


def resnets(unet):
    return {name: m for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D)}


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_time_embedding_of_sd21():
    with torch.device("meta"):
        unet = RestorationUNet.from_base_config(PRESETS["sd21"])
    embedding = unet.time_proj(torch.tensor([999.0]))[0]  # it holds no weights, so it runs
    assert embedding.shape == (320,)
    published = [0.999650, 0.802678, -0.278062]
    assert embedding[:3].tolist() == pytest.approx(published, abs=2e-4)  # fp32 angles up to 999 rad: 6e-5
    assert embedding[160:163].tolist() == pytest.approx([-0.026461, 0.596413, -0.960563], abs=2e-4)
    angles = [999 * math.exp(-math.log(10000) * i / 160) for i in range(160)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert embedding.tolist() == pytest.approx(expected, abs=2e-4)


def test_sizes_of_sd21_equal_the_published_checkpoints():
    config = PRESETS["sd21"]
    with torch.device("meta"):
        unet = RestorationUNet.from_base_config(config)
        structure = StructureEncoder.from_base_config(config)
        blocks = build_blocks(unet, config.layers, config.head_size)
    spade = sum(p.numel() for name, p in unet.named_parameters() if ".spade." in name)
    assert spade == 53_020_160
    assert sum(".spade." in name for name in unet.state_dict()) == 176
    assert count(unet) == 918_930_884
    assert len(unet.state_dict()) == 862
    assert count(structure) == 52_494_080
    widths = (1280, 640, 640, 320)
    gammas = sum(widths)
    assert count(blocks) - gammas == 51_248_960 == sum(20 * c * c + 17 * c for c in widths)
    assert [block.gamma.numel() for block in blocks] == list(widths)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_residual_block_carries_a_spade_of_its_width(name):
    unet = build(CONFIGS[name])
    blocks = resnets(unet)
    levels, layers = len(CONFIGS[name].unet["block_out_channels"]), CONFIGS[name].unet["layers_per_block"]
    assert len(blocks) == levels * layers + 2 + levels * (layers + 1)
    for block in blocks.values():
        assert isinstance(block.spade, Spade)
        assert block.spade.param_free_norm.num_channels == block.conv2.out_channels
        assert block.spade.param_free_norm.affine


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_diffusers_when_spade_changes_nothing(name):
    config = CONFIGS[name]
    unet = build(config)
    x, t, context, maps = inputs(config)
    expected = diffusers_twin(unet, config)(x, t, context).sample.detach()
    assert expected.std() > 0.01
    assert not torch.allclose(unet(x, t, context, maps), expected, rtol=0, atol=1e-2)
    for block in resnets(unet).values():
        block.spade = WithoutSpade()
    # The same operations in the same order, but for the memory layout of the attention.
    assert torch.allclose(unet(x, t, context, maps), expected, rtol=0, atol=1e-5)


def test_spade_enters_every_block_after_conv2_and_before_the_skip():
    # diffusers' own forward with hooks on conv2 is the construction that StableSR's checkpoint was checked with.
    unet = build(SMALL_SD21)
    x, t, context, maps = inputs(SMALL_SD21)
    twin = diffusers_twin(unet, SMALL_SD21)
    calls = []
    for name, block in resnets(twin).items():
        spade = unet.get_submodule(name).spade

        def modulate(module, args, h, spade=spade):
            calls.append(h.shape)
            return spade(h, maps[h.shape[-1]])

        block.conv2.register_forward_hook(modulate)
    expected = twin(x, t, context).sample.detach()
    assert len(calls) == 22
    assert torch.allclose(unet(x, t, context, maps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "groups"), [(8, 8, 4), (5, 7, 1), (1, 3, 8)])
def test_spade_formula(height, width, groups):
    torch.manual_seed(0)
    spade = Spade(16, 6, 10, groups)
    nn.init.normal_(spade.param_free_norm.weight)
    nn.init.normal_(spade.param_free_norm.bias)
    h, s = 3 * torch.randn(2, 16, height, width) + 1, torch.randn(2, 6, height, width)
    w = {name: p.detach().double() for name, p in spade.named_parameters()}
    grouped = h.double().reshape(2, groups, -1)
    spread = grouped.var(-1, unbiased=False, keepdim=True)
    n = ((grouped - grouped.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt()).reshape(h.shape)
    n = n * w["param_free_norm.weight"][:, None, None] + w["param_free_norm.bias"][:, None, None]

    def conv(name, value):
        return F.conv2d(value, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    a = conv("mlp_shared.0", s.double()).clamp(min=0)
    expected = n * (1 + conv("mlp_gamma", a)) + conv("mlp_beta", a)
    assert torch.allclose(spade(h, s).double(), expected, rtol=0, atol=1e-5)  # fp32 sums of 90 products


def test_every_level_of_the_structure_maps_counts():
    unet = build(SMALL_SD21)
    x, t, context, maps = inputs(SMALL_SD21)
    reference = unet(x, t, context, maps)
    for side in maps:
        changed = {**maps, side: maps[side] + 1}
        assert (unet(x, t, context, changed) - reference).abs().max() > 1e-4, side


def test_rows_do_not_mix():
    unet = build(SMALL_SD21)
    x, t, context, maps = inputs(SMALL_SD21)
    both = unet(x, t, context, maps)
    for i in range(2):
        one = unet(x[i : i + 1], t[i : i + 1], context[i : i + 1], {k: m[i : i + 1] for k, m in maps.items()})
        assert torch.allclose(one[0], both[i], rtol=0, atol=1e-5)


def test_taps_see_the_output_of_their_transformer():
    unet = build(SMALL_SD21)
    x, t, context, maps = inputs(SMALL_SD21)
    outputs, seen, order = {}, {}, []

    def keep(layer):
        def tap(tokens):
            order.append(layer)
            seen[layer] = tokens
            return tokens

        return tap

    twin = diffusers_twin(unet, SMALL_SD21)
    for block in resnets(unet).values():
        block.spade = WithoutSpade()
    for layer in SMALL_SD21.layers:
        twin.get_submodule(layer).register_forward_hook(
            lambda module, args, out, layer=layer: outputs.update({layer: out[0]})
        )
    with torch.no_grad():
        twin(x, t, context)
    plain = unet(x, t, context, maps)
    tapped = unet(x, t, context, maps, taps={layer: keep(layer) for layer in SMALL_SD21.layers})
    assert torch.equal(tapped, plain)  # a tap that changes nothing
    assert order == list(SMALL_SD21.layers)
    for layer in SMALL_SD21.layers:
        assert torch.allclose(to_map(seen[layer], outputs[layer].shape[-2:]), outputs[layer], rtol=0, atol=1e-5)


def test_tokens_run_row_by_row():
    h = torch.arange(24.0).reshape(1, 2, 3, 4)
    tokens = to_tokens(h)
    assert tokens.shape == (1, 12, 2)
    assert tokens[0, 5].tolist() == [h[0, 0, 1, 1], h[0, 1, 1, 1]]
    assert torch.equal(to_map(tokens, (3, 4)), h)


def test_the_unet_takes_images_that_are_not_square():
    unet = build(SMALL_SD21)
    x = torch.randn(1, 4, 16, 8)
    maps = {8 >> i: torch.randn(1, 8, 16 >> i, 8 >> i) for i in range(4)}
    assert unet(x, torch.tensor([5.0]), torch.randn(1, 3, 32), maps).shape == x.shape
