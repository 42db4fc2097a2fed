import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from pfstorer_rt.export import build, export_plan, parity
from pfstorer_rt.export.graph import build_graph, fuse
from pfstorer_rt.export.parity import probe_inputs, probe_tiles
from torch import nn
from torch.overrides import TorchFunctionMode

from pfstorer_rt.engine.onnxruntime import OnnxRuntimeSession
from pfstorer_rt.engine.torch import open_sessions
from pfstorer_rt.errors import ParityError
from pfstorer_rt.models import precision
from pfstorer_rt.models.base import build_base
from pfstorer_rt.models.components import decoder, denoiser, encoder
from pfstorer_rt.models.precision import TypedComponent, centred
from pfstorer_rt.onnx_message import read_graph
from pfstorer_rt.ops import sdpa
from pfstorer_rt.runtime.restorer import Restorer


def qkv(offset=0.0, seed=0, tokens=40):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, tokens, 16, generator=generator) for _ in range(3))
    return q + offset, k + offset, v


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_centred_keys_do_not_change_attention(offset):
    q, k, v = (t.double() for t in qkv(offset))
    mask = torch.rand(2, 1, 1, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    for m in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=m)
        # The mean is computed in fp32.
        assert torch.allclose(centred(sdpa)(q, k, v, m), expected, rtol=0, atol=1e-5)


def test_centred_keys_keep_scores_of_flat_tokens_small():
    q, k, v = qkv(offset=300.0)
    halves = [t.half() for t in (q, k, v)]
    assert torch.isinf(halves[0] @ halves[1].transpose(-1, -2)).all()
    seen = {}

    class Watch(TorchFunctionMode):
        """Keeps the scores of an attention in fp16."""

        def __torch_function__(self, function, types, arguments=(), options=None):
            if function is F.scaled_dot_product_attention:
                q, k, _ = arguments
                seen["scores"] = q @ k.transpose(-1, -2)
            return function(*arguments, **options or {})

    with Watch():
        centred(sdpa)(*halves)
    assert torch.isfinite(seen["scores"]).all()


def overflowing(base):
    """The nano base with one self-attention whose queries and keys are large and all but equal on a flat tile."""
    attn = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    norm = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].norm1
    with torch.no_grad():
        norm.bias.fill_(80.0)
        for linear in (attn.to_q, attn.to_k):
            linear.weight.abs_()
    return base


def flat_inputs(base, tile):
    """Inputs of the denoiser without noise, for a tile of one colour."""
    inputs = probe_inputs(denoiser(base))[tile]
    return {**inputs, "x": inputs["z_lq"].clone()}


@torch.no_grad()
def test_scores_of_flat_tiles_overflow_fp16_without_centred_keys():
    """The base of `test_centred_keys_prevent_overflow_on_flat_tiles` needs the centred keys."""
    base, seen = overflowing(build_base("nano", seed=0)), []
    block = base.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.norm1.register_forward_hook(lambda _, __, out: seen.append(out))
    denoiser(base).module(*flat_inputs(base, "grey").values())
    q, k = (
        linear(seen[0][:1]).unflatten(-1, (block.attn1.heads, -1)) for linear in (block.attn1.to_q, block.attn1.to_k)
    )
    assert torch.isinf(q.transpose(1, 2).half() @ k.transpose(1, 2).half().mT).any()


def test_centred_keys_prevent_overflow_on_flat_tiles():
    base = overflowing(build_base("nano", seed=0))
    original = fuse(denoiser(base)).module
    graph = build_graph(fuse(denoiser(base)), "fp16")
    with OnnxRuntimeSession(graph.to_bytes()) as session:
        for tile in ("grey", "black", "white"):
            inputs = flat_inputs(base, tile)
            found = session.run(**{name: inputs[name].numpy() for name in session.inputs})["prediction"]
            expected = parity.outputs_of(original, inputs)[0]
            assert np.square(found - expected).mean() ** 0.5 < 0.005 * expected.std()


def test_pytorchs_attention_does_not_overflow_on_flat_tiles():
    base = overflowing(build_base("nano", seed=0))
    session = open_sessions(base, precision="fp16")["denoiser"]
    processors = [m.processor for m in session.module.modules() if isinstance(m, Attention)]
    assert processors and all(processor.attention is sdpa for processor in processors)  # no centred keys
    for tile in ("grey", "black", "white"):
        inputs = flat_inputs(base, tile)
        found = session.compute(**{name: inputs[name] for name in session.inputs})["prediction"].numpy()
        expected = parity.outputs_of(denoiser(base).module, inputs)[0]
        assert np.square(found - expected).mean() ** 0.5 < 0.01 * expected.std()


def test_pytorchs_norms_take_fp16_and_do_not_overflow(nano_base):
    session = open_sessions(nano_base, precision="fp16")["denoiser"]
    fp32 = {n for n, p in session.module.named_parameters() if p.dtype == torch.float32}
    assert fp32 and all(".time_embedding." in name for name in fp32)
    x = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)
    x[..., ::2] = -300
    for norm in (nn.GroupNorm(1, 4).half(), nn.LayerNorm((4, 64, 64)).half()):
        assert torch.allclose(norm(x).abs().float(), torch.ones(()), atol=1e-3)


def test_norms_and_time_embedding_stay_in_fp32(nano_base, nano_identity):
    component = fuse(denoiser(nano_base, nano_identity))
    typed = TypedComponent(component.module, "fp16")
    fp32 = {n for n, p in typed.named_parameters() if p.dtype == torch.float32}
    owners = {type(typed.get_submodule(n.rpartition(".")[0])).__name__ for n in fp32}
    assert owners == {"GroupNorm", "LayerNorm", "Linear"}
    assert {n for n in fp32 if "norm" not in n} == {n for n, _ in typed.named_parameters() if ".time_embedding." in n}
    typed.module.denoiser.unet.time_proj.register_forward_hook(
        lambda _, __, out: pytest.fail("the sinusoid is rounded") if out.dtype != torch.float32 else None
    )
    seen = []
    for module in typed.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    typed(*component.example_inputs().values())
    assert seen and set(seen) == {(torch.float32, torch.float16)}


def test_group_norm_statistics_do_not_overflow():
    norm = nn.GroupNorm(1, 4)
    precision.compute_in_float32(norm)
    x = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)
    x[..., ::2] = -300
    assert torch.isinf((x * x).sum(dtype=torch.float16))
    assert norm(x).dtype == torch.float16 and torch.allclose(norm(x).abs().float(), torch.ones(()), atol=1e-3)


def test_fp16_plans_are_half_the_size_and_restore_the_same(nano_plan, nano_base, nano_identity, tmp_path, make_image):
    plan = export_plan(tmp_path / "half.plan", nano_identity, nano_base, precision="fp16")
    assert plan.manifest.precision == "fp16"
    assert {payload.precision for payload in plan.manifest.payloads.values()} == {"fp16"}
    half, full = (sum(t.inside for t in read_graph(p.read("denoiser")).tensors) for p in (plan, nano_plan))
    assert half < 0.65 * full
    pixels = make_image(70, 90)
    full, half = (Restorer.from_plan(path, "onnxruntime") for path in (nano_plan.path, plan.path))
    with full, half:
        error = np.mean((full.restore(pixels).astype(np.float64) - half.restore(pixels)) ** 2)
    assert -10 * np.log10(error) > 45


def test_a_decoder_that_would_overflow_stays_in_fp32(tmp_path):
    base = build_base("nano", seed=0)
    with torch.no_grad():
        base.vae.decoder.layers[0].weight.mul_(1e6)
        base.vae.decoder.layers[2].conv[0].weight.mul_(1e-6)
    expected = build.expect(decoder(base), "fp16")
    assert expected.largest > 65504
    told = []
    plan = export_plan(tmp_path / "a.plan", None, base, precision="fp16", progress=build.Progress(line=told.append))
    assert plan.manifest.payloads["decoder"].precision == "fp32"
    assert plan.manifest.payloads["encoder"].precision == plan.manifest.payloads["denoiser"].precision == "fp16"
    assert any("decoder: its values reach" in line and "stays in fp32" in line for line in told)


def test_an_encoder_that_fp16_changes_too_much_stays_in_fp32(nano_base, tmp_path, monkeypatch):
    monkeypatch.setitem(parity.LIMIT, "fp16", 1e-4)  # what fp32 meets and halves cannot
    told = []
    component, progress = encoder(nano_base), build.Progress(line=told.append)
    expected = build.expect(component, "fp16")
    made = build.export_component(component, "fp16", expected, True, tmp_path, progress)
    assert made.precision == "fp32" and made.figures["relative"] <= 1e-4
    assert any("encoder: the largest error of the exported graph" in line and "stays in fp32" in line for line in told)


def test_a_denoiser_that_would_overflow_is_refused(tmp_path):
    base = build_base("nano", seed=0)
    with torch.no_grad():
        base.unet.conv_in.weight.mul_(1e7)
    with pytest.raises(ParityError, match=r"denoiser: its values reach .*export with precision fp32"):
        export_plan(tmp_path / "a.plan", None, base, precision="fp16")
    assert list(tmp_path.iterdir()) == []


def state(base):
    """Types, devices, values and kernels of a base, and whether its networks train."""
    networks = base.modules().values()
    return (
        [(t.dtype, t.device, t.clone()) for network in networks for t in network.state_dict().values()],
        [id(getattr(m, "processor", None)) for network in networks for m in network.modules()],
        [id(getattr(m, "kernels", None)) for network in networks for m in network.modules()],
        [m.training for network in networks for m in network.modules()],
    )


def assert_unchanged(before, base):
    after = state(base)
    assert after[1:] == before[1:]
    for (kind, device, values), (old_kind, old_device, old_values) in zip(after[0], before[0], strict=True):
        assert (kind, device) == (old_kind, old_device) and torch.equal(values, old_values)


@pytest.mark.parametrize("fails", [True, False])
def test_an_export_leaves_the_callers_base_unchanged(fails, exported_once, tmp_path, monkeypatch):
    base = build_base("nano", seed=0).to("cpu", torch.float64)
    base.set_attention("math")
    base.vae.train()
    before = state(base)
    if fails:
        monkeypatch.setitem(parity.LIMIT, "fp16", -1.0)  # the denoiser is exported, and refused
        with pytest.raises(ParityError):
            export_plan(tmp_path / "a.plan", None, base, precision="fp16")
    else:
        plan = export_plan(tmp_path / "a.plan", None, base, precision="fp16")
        usual = exported_once(precision="fp16")
        assert plan.read("denoiser") == usual.read("denoiser")  # the kernels of a base are no part of its graphs
    assert_unchanged(before, base)


def test_probe_tiles_cover_photographs_flat_colours_and_noise():
    tiles = probe_tiles(64)
    assert list(tiles) == ["photo", "grey", "black", "white", "noise"]
    for image in tiles.values():
        assert image.shape == (1, 3, 64, 64) and image.min() >= -1 and image.max() <= 1
    assert [tiles[n].unique().tolist() for n in ("grey", "black", "white")] == [[0.0], [-1.0], [1.0]]


def test_identity_tensors_as_inputs_give_the_results_of_constants(nano_base, make_nano_identity):
    alice, bob = (make_nano_identity(gammas=(1.0,) * 4, seed=seed) for seed in (1, 2))
    shared = build_graph(fuse(denoiser(nano_base, alice)), identity="inputs")
    inputs = denoiser(nano_base, alice).example_inputs(3)
    with OnnxRuntimeSession(shared.to_bytes()) as session:
        for person in (alice, bob):
            fused = fuse(denoiser(nano_base, person)).module
            tensors = {**inputs, **fused.identity_tensors()}
            assert session.inputs == tuple(tensors)
            found = session.run(**{name: tensor.numpy() for name, tensor in tensors.items()})["prediction"]
            expected = parity.outputs_of(fused, inputs)[0]
            assert np.abs(found - expected).max() < 1e-4 * expected.std()
    apart = np.abs(parity.outputs_of(fuse(denoiser(nano_base, alice)).module, inputs)[0] - expected).max()
    assert apart > 1e-2 * expected.std()
    constants = build_graph(fuse(denoiser(nano_base, alice)))
    assert shared.weight_bytes() < constants.weight_bytes()


def test_identity_inputs_of_an_fp16_graph_are_fp16(nano_base, nano_identity):
    component = fuse(denoiser(nano_base, nano_identity))
    graph = build_graph(component, "fp16", identity="inputs")
    inputs = component.example_inputs()
    with OnnxRuntimeSession(graph.to_bytes()) as session:
        tensors = {**inputs, **component.module.identity_tensors()}
        kinds = {n: t.dtype for n, t in tensors.items() if n.endswith((".k", ".v", ".gamma", ".to_q.weight"))}
        assert set(kinds.values()) == {torch.float16}
        found = session.run(**{name: tensor.numpy() for name, tensor in tensors.items()})["prediction"]
    expected = parity.outputs_of(fuse(denoiser(nano_base, nano_identity)).module, inputs)[0]
    assert np.abs(found - expected).max() < 0.05 * expected.std()
