from functools import partial

import pytest
import torch
from torch import nn

from pfstorer_rt.config import PRESETS, PersonalizeConfig
from pfstorer_rt.models.denoiser import Denoiser
from pfstorer_rt.models.personalization import (
    LowRankLinear,
    PersonalizationBlock,
    build_blocks,
    make_low_rank,
    reference_mask,
)
from pfstorer_rt.models.reference import reference_features, subject_ids
from pfstorer_rt.models.unet import RestorationUNet
from pfstorer_rt.training.losses import attention_loss
from pfstorer_rt.training.objectives import PersonalizationObjective


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_block(channels=16, head_size=8, **more):
    torch.manual_seed(4)
    block = PersonalizationBlock(channels, head_size, **more).eval().requires_grad_(False)
    nn.init.normal_(block.block.norm2.weight)  # so that a norm in the wrong place shows
    return block


def denoiser_inputs(batch=2):
    return normal(batch, 4, 8, 8, seed=1), torch.tensor([999.0, 4.0])[:batch], normal(batch, 4, 8, 8, seed=2)


@torch.no_grad()
def predict(base, identity=None, strength=1.0):
    return Denoiser(base, identity)(*denoiser_inputs(), strength)


def make_batch(n=2, seed=0, use_self=False, t=(700, 20)):
    hq, lq, noise = (normal(n, 4, 8, 8, seed=seed + k) for k in (0, 1, 3))
    return {
        "hq": hq,
        "lq": lq,
        "reference": normal(1, 4, 8, 8, seed=seed + 2),
        "noise": noise,
        "t": torch.tensor(t[:n]),
        "self": torch.tensor(use_self),
    }


@pytest.fixture
def objective(nano_base):
    def make(gamma=0.0, **settings):
        torch.manual_seed(0)
        made = PersonalizationObjective(nano_base, PersonalizeConfig(**settings))
        with torch.no_grad():
            for block in made.blocks if gamma else ():
                block.gamma.fill_(gamma)
        return made

    return make


def test_an_identity_changes_the_prediction(nano_base, nano_identity):
    assert (predict(nano_base, nano_identity) - predict(nano_base)).abs().max() > 0.05


def test_gamma_zero_equals_the_base_bit_for_bit(nano_base, make_nano_identity):
    identity = make_nano_identity(gammas=(0.0,) * 4)
    assert torch.equal(predict(nano_base, identity), predict(nano_base))


@pytest.mark.parametrize("settings", [{}, {"ref_source": "self"}])
def test_strength_zero_equals_the_base_bit_for_bit(nano_base, make_nano_identity, settings):
    identity = make_nano_identity(**settings)
    assert torch.equal(predict(nano_base, identity, 0.0), predict(nano_base))
    assert torch.equal(predict(nano_base, identity, torch.zeros(1)), predict(nano_base))
    assert not torch.equal(predict(nano_base, identity, 1.0), predict(nano_base))


def test_strength_scales_gamma(nano_base, make_nano_identity):
    half = make_nano_identity()
    for i in range(4):
        half.tensors[f"blocks.{i}.gamma"] = half.tensors[f"blocks.{i}.gamma"] / 2
    found = predict(nano_base, make_nano_identity(), 0.5)
    assert torch.allclose(found, predict(nano_base, half), rtol=0, atol=1e-5)


def vico_update(block, x, reference):
    """The block of ViCo, step by step from its own layers."""
    b = block.block
    a = x + b.attn1(b.norm1(x))
    a = a + b.attn2(b.norm2(a), encoder_hidden_states=x if reference is None else reference)
    return a + b.ff(b.norm3(a))


def test_gamma_one_equals_the_update_of_vico():
    block = make_block()
    block.gamma.fill_(1.0)
    x, reference = normal(2, 12, 16), normal(2, 7, 16, seed=1)
    assert torch.allclose(block(x, reference), vico_update(block, x, reference), rtol=0, atol=1e-5)
    assert (block(x, reference) - x).abs().max() > 0.1


def test_reference_tokens_are_not_normalised():
    block = make_block()
    block.gamma.fill_(1.0)
    x, reference = normal(1, 12, 16), normal(1, 7, 16, seed=1)
    assert (block(x, reference) - block(x, 3 * reference + 1)).abs().max() > 1e-3


def test_eq_3_for_any_gamma():
    block = make_block()
    block.gamma.copy_(normal(16, seed=9))
    x, reference = normal(2, 12, 16), normal(2, 7, 16, seed=1)
    delta = vico_update(block, x, reference).double() - x.double()
    expected = x.double() + 0.7 * block.gamma.double() * delta
    assert torch.allclose(block(x, reference, strength=0.7).double(), expected, rtol=0, atol=1e-5)


def test_without_a_reference_tokens_attend_to_themselves_unnormalised():
    # method: k and v come from the reference as it is; in `self` the reference is the block's own stream.
    block = make_block()
    block.gamma.fill_(1.0)
    x = normal(2, 12, 16)
    b = block.block
    a = x + b.attn1(b.norm1(x))
    a = a + b.attn2(b.norm2(a))
    assert torch.allclose(block(x, None), a + b.ff(b.norm3(a)), rtol=0, atol=1e-5)


def test_masking_tokens_equals_removing_them():
    block = make_block()
    block.gamma.fill_(1.0)
    x, reference = normal(2, 12, 16), normal(2, 9, 16, seed=1)
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    masked = block(x, reference, kept.expand(2, -1))
    assert torch.allclose(masked, block(x, reference[:, kept]), rtol=0, atol=1e-5)
    assert (masked - block(x, reference)).abs().max() > 1e-3


def test_a_cached_reference_equals_masked_attention_in_the_unet(nano_base, make_nano_identity):
    identity = make_nano_identity()
    masks = [identity.tensors[f"mask.{i}"] for i in range(4)]
    assert any(0 < int(m.sum()) < m.numel() for m in masks)
    whole = Denoiser(nano_base, identity)
    for i, block in enumerate(whole.blocks):
        block.reference = identity.tensors[f"reference.{i}"].float()[None]
        block.forward = partial(block.forward, mask=masks[i][None].bool())
    with torch.no_grad():
        expected = whole(*denoiser_inputs())
    assert torch.allclose(predict(nano_base, identity), expected, rtol=0, atol=1e-5)


def mask_by_loops(row):
    """ViCo's Otsu mask of one map, as method section 3.4 puts it."""
    low, high = min(row), max(row)
    if low == high:
        return [True] * len(row)
    v = [(value - low) / (high - low) for value in row]
    best, threshold = float("-inf"), None
    for t in range(10):
        below, above = [x for x in v if x < t / 10], [x for x in v if x >= t / 10]
        if not below or not above:
            continue  # NaN in the original, and no comparison with NaN is true
        means = sum(below) / len(below), sum(above) / len(above)
        g = len(below) / len(v) * len(above) / len(v) * (means[0] - means[1]) ** 2
        if g > best + 1e-9:  # strictly; equal sums differ by rounding
            best, threshold = g, t / 10
    return [x >= threshold and x != 0 for x in v]


@pytest.mark.parametrize("power", [0.25, 1, 4, 12])
def test_reference_mask_uses_otsus_threshold(power):
    maps = torch.rand(40, 37, generator=torch.Generator().manual_seed(1)) ** power * 1e-3
    found = reference_mask(maps)
    assert found.dtype == torch.bool
    assert found.tolist() == [mask_by_loops(row) for row in maps.double().tolist()]
    assert 0 < found.float().mean() < 1


def test_reference_mask_equals_a_loop_for_unusual_maps():
    rows = [
        [0.2] * 6,  # constant: everything is kept
        [0.0] * 6,
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
        [0.0, 0.05, 0.07, 0.93, 0.97, 1.0],  # thresholds 0.1 to 0.9 are equal: the first
        [0.0, 0.125, 0.25, 0.5, 0.75, 1.0],
    ]
    assert reference_mask(torch.tensor(rows)).tolist() == [mask_by_loops(row) for row in rows]
    assert reference_mask(torch.tensor([[0.3]])).tolist() == [[True]]
    assert reference_mask(torch.tensor(rows[:2])).all()


def test_low_rank_is_a_product_of_two_matrices():
    linear = LowRankLinear(nn.Linear(16, 24), 3)
    x = normal(5, 16)
    matrix = linear.up.weight.double() @ linear.down.weight.double()
    assert torch.linalg.matrix_rank(matrix) == 3
    assert torch.allclose(linear(x).double(), x.double() @ matrix.T + linear.up.bias.double(), rtol=0, atol=1e-5)


def test_low_rank_replaces_only_larger_layers():
    whole, low = make_block(64, 8), make_block(64, 8, rank=4)
    sizes = [sum(p.numel() for p in block.parameters()) for block in (whole, low)]
    assert sizes[1] < sizes[0] / 4
    assert any(isinstance(m, LowRankLinear) for m in low.modules())
    assert not any(isinstance(m, nn.Linear) and min(m.weight.shape) > 4 for m in low.modules())
    same = make_block(64, 8)
    make_low_rank(same, 64)
    assert not any(isinstance(m, LowRankLinear) for m in same.modules())


def test_low_rank_identities_run(nano_base, make_nano_identity):
    identity = make_nano_identity(rank=2)
    assert predict(nano_base, identity).isfinite().all()
    assert torch.equal(predict(nano_base, identity, 0.0), predict(nano_base))


def test_unknown_layers_are_refused(nano_base):
    with pytest.raises(ValueError, match="not a spatial transformer"):
        build_blocks(nano_base.unet, ("up_blocks.0.resnets.0",), 8)


def test_rows_of_a_batch_share_one_reference():
    block = make_block()
    block.gamma.fill_(1.0)
    x, reference = normal(3, 4, 16), normal(1, 5, 16, seed=1)
    mask = torch.tensor([[True, True, False, True, False]])
    assert torch.equal(block(x, reference, mask), block(x, reference.expand(3, -1, -1), mask.expand(3, -1)))


def test_a_block_attends_to_its_own_reference_unless_a_call_passes_another():
    block = make_block()
    block.gamma.fill_(1.0)
    x, own, other = normal(2, 4, 16), normal(1, 5, 16, seed=1), normal(1, 7, 16, seed=2)
    expected, without = (block(x, reference) for reference in (own, None))
    block.reference = own
    assert torch.equal(block(x), expected) and not torch.equal(expected, without)
    assert not torch.equal(block(x, other), expected)
    assert "reference" not in block.state_dict()  # it belongs to the identity file under a name of its own


def test_folding_a_reference_keeps_the_result():
    block = make_block()
    block.gamma.fill_(1.0)
    block.reference = normal(1, 5, 16, seed=1)
    x = normal(2, 4, 16)
    expected = block(x)
    block.fold_reference()
    assert isinstance(block.block.attn2.to_k, nn.Identity) and block.reference is None
    assert torch.allclose(block(x), expected, rtol=0, atol=1e-5)
    plain = make_block()
    plain.fold_reference()
    assert isinstance(plain.block.attn2.to_k, nn.Linear)  # without a reference nothing is constant


def gradients(objective, batch, loss="loss"):
    objective.zero_grad(set_to_none=True)
    objective(batch)[loss].backward()
    return {n: 0.0 if p.grad is None else p.grad.abs().max().item() for n, p in objective.named_parameters()}


def test_only_gamma_has_a_gradient_at_the_start(objective):
    found = gradients(objective(lambda_pers=0.0), make_batch())
    moving = {name for name, size in found.items() if size > 0}
    assert moving == {f"blocks.{i}.gamma" for i in range(4)}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("start", ["open", "prior"])  # the base of the tests has no prior
def test_an_open_start_equals_the_base_and_moves_the_last_layers(objective, start, rank):
    made, closed, batch = objective(start=start, rank=rank), objective(rank=rank), make_batch()
    assert all(bool((block.gamma == 1).all()) for block in made.blocks)
    with torch.no_grad():
        assert made(batch)["diff"].item() == closed(batch)["diff"].item()
    found = gradients(made, batch)
    moving = {name for name, size in found.items() if size > 0 and name.startswith("blocks.0.")}
    last = "up.weight" if rank else "weight"
    assert f"blocks.0.block.ff.net.2.{last}" in moving and f"blocks.0.block.attn2.to_out.0.{last}" in moving
    assert f"blocks.0.block.attn2.to_k.{last}" not in moving  # the layers before have none yet


def test_without_lambda_gen_no_null_row_is_run(objective, nano_base):
    made, rows = objective(lambda_gen=0.0), []
    handle = made.structure_encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = gradients(made, make_batch())
    handle.remove()
    assert sorted(rows) == [1, 2]  # the reference and the two samples
    assert all(found[f"blocks.{i}.gamma"] > 0 for i in range(4))


def test_the_token_has_a_gradient_from_its_own_loss(objective):
    found = gradients(objective(), make_batch(), "pers")
    assert {name for name, size in found.items() if size > 0} == {"token"}


def test_vico_has_no_gamma_to_learn(objective):
    made = objective(method="vico")
    found = gradients(made, make_batch())
    assert all(found[f"blocks.{i}.gamma"] == 0 for i in range(4))
    assert all(not block.gamma.requires_grad and bool((block.gamma == 1).all()) for block in made.blocks)
    for i in range(4):
        weights = {n: size for n, size in found.items() if n.startswith(f"blocks.{i}.block.") and n.endswith("weight")}
        assert all(size > 0 for size in weights.values()), weights


def test_the_base_has_no_gradient(objective, nano_base):
    made = objective(gamma=0.5)
    made(make_batch())["loss"].backward()
    for name, module in nano_base.modules().items():
        assert all(p.grad is None and not p.requires_grad for p in module.parameters()), name
    assert made.token.grad.abs().max() > 0


@pytest.mark.parametrize("gen_rows", [1, 2, 5])
@pytest.mark.parametrize("weighting", ["prediction", "x0"])
def test_losses_of_an_untrained_identity_equal_the_bases(objective, nano_base, weighting, gen_rows):
    made = objective(lambda_gen=0.25, lambda_pers=0.125, weighting=weighting, gen_rows=gen_rows)
    batch = make_batch()
    with torch.no_grad():
        losses = made(batch)
        x0, z_lq = batch["hq"], batch["lq"]
        abar = nano_base.schedule.alphas_cumprod_tensor()[batch["t"]].double()[:, None, None, None]
        x = (abar.sqrt() * x0 + (1 - abar).sqrt() * batch["noise"]).float()
        context = nano_base.encode_prompt().expand(2, -1, -1)

        def error(condition):
            eps = nano_base.unet(x, batch["t"], context, nano_base.structure_encoder(condition, batch["t"])).double()
            if weighting == "prediction":
                return (eps - batch["noise"]).square().mean((1, 2, 3))
            return ((x - (1 - abar).sqrt() * eps) / abar.sqrt() - x0).square().mean((1, 2, 3))  # the clean latents

        diff, gen = error(z_lq).mean().item(), error(torch.zeros_like(z_lq))[:gen_rows].mean().item()
    assert losses["diff"].item() == pytest.approx(diff, rel=1e-4)
    assert losses["gen"].item() == pytest.approx(gen, rel=1e-4)
    assert abs(diff - gen) > 1e-3 * diff  # the null condition is another one
    total = diff + 0.25 * gen + 0.125 * losses["pers"].item()
    assert losses["loss"].item() == pytest.approx(total, rel=1e-4)


def test_each_row_has_its_condition(objective, nano_base):
    made, batch, seen = objective(), make_batch(), []
    handle = made.structure_encoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        made(batch)
        z_lq, z_ref = batch["lq"], batch["reference"]
    handle.remove()
    z, t = (torch.cat(parts) for parts in zip(*seen, strict=True))
    # L_diff sees the LQ latent, L_gen the zero latent, and the reference is clean, at timestep 0.
    expected = [(z_lq[0], 700), (z_lq[1], 20), (0 * z_lq[0], 700), (z_ref[0], 0)]
    assert len(z) == len(expected)
    for latent, time in expected:
        assert (
            sum(bool(b == time and torch.allclose(a, latent, rtol=0, atol=1e-5)) for a, b in zip(z, t, strict=True))
            == 1
        )


@torch.no_grad()
def test_reference_dropout_removes_the_reference(objective):
    made = objective(gamma=0.7)
    one, other = make_batch(use_self=True), make_batch(use_self=True)
    other["reference"] = -one["reference"]
    assert torch.allclose(made(one)["diff"], made(other)["diff"], rtol=1e-5)
    one["self"] = other["self"] = torch.tensor(False)
    assert (made(one)["diff"] - made(other)["diff"]).abs() > 1e-6


def test_a_subject_prompt_may_contain_braces(nano_base):
    with pytest.raises(ValueError, match=r"expected \{\} in it"):
        subject_ids(nano_base, "a {0.__class__} of a {0}")


@torch.no_grad()
def test_the_cached_reference_equals_the_reference_in_training(objective, nano_base):
    made, batch, seen = objective(gamma=0.3), make_batch(n=1), []
    handles = [
        block.register_forward_pre_hook(lambda module, args, passed: seen.append(passed), with_kwargs=True)
        for block in made.blocks
    ]
    made(batch)
    for handle in handles:
        handle.remove()
    found = reference_features(nano_base, batch["reference"], made.token.data, "a photo of a {}", made.blocks.layers)
    for layer, passed in zip(made.blocks.layers, seen, strict=True):
        features, mask = found[layer]
        assert 0 < mask.sum() < mask.numel()
        # One row, shared by the LQ and the null rows; the tokens outside the mask are left out.
        assert torch.allclose(passed["reference"], features[mask][None], rtol=0, atol=1e-5)


def test_l_pers_equals_its_formula():
    maps = torch.rand(3, 10, 6, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for row in maps.double():
        p, e = row[:, 4] / row[:, 4].max(), row[:, 5] / row[:, 5].max()
        total += float(((p - e) ** 2).mean())
    assert attention_loss(maps, subject=4, end=5).item() == pytest.approx(total / 3, rel=1e-5)
    leaf = maps.clone().requires_grad_()
    attention_loss(leaf, 4, 5).backward()
    assert leaf.grad[:, :, 4].any()
    assert not leaf.grad[:, :, [0, 1, 2, 3, 5]].any()  # the end of the text only leads


def test_l_pers_sums_the_layers(objective, nano_base):
    made, batch = objective(), make_batch(n=1)
    expected = 0.0
    layers = made.blocks.layers
    probabilities = {}
    with torch.no_grad():
        subject = nano_base.encode_prompt("a photo of a S*", made.token)[0]

    def record(layer):
        attn = nano_base.unet.get_submodule(layer).transformer_blocks[0].attn2

        def hook(module, args, kwargs):
            contexts = kwargs["encoder_hidden_states"]
            found = [i for i, c in enumerate(contexts) if torch.allclose(c, subject, rtol=0, atol=1e-5)]
            if not found:
                return  # a pass without the reference row
            assert layer not in probabilities and len(found) == 1
            q = args[0][found[0]].double() @ attn.to_q.weight.double().T
            k = subject.double() @ attn.to_k.weight.double().T
            q, k = (tokens.reshape(len(tokens), attn.heads, -1).transpose(0, 1) for tokens in (q, k))
            probabilities[layer] = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)

        return attn.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [record(layer) for layer in layers]
    with torch.no_grad():
        losses = made(batch)
        for layer in layers:
            p, e = (probabilities[layer][:, i] for i in made.positions)
            expected += float(((p / p.max() - e / e.max()) ** 2).mean())
    for handle in handles:
        handle.remove()
    assert losses["pers"].item() == pytest.approx(expected, rel=1e-3)
    assert expected > 0


@pytest.mark.parametrize("rank,megabytes", [(0, 130), (16, 10)])
def test_an_identity_of_full_size_stays_small(rank, megabytes):
    config = PRESETS["sd21"]
    with torch.device("meta"):
        unet = RestorationUNet.from_base_config(config)
        blocks = build_blocks(unet, config.layers, config.head_size, rank)
    # The token's level of the four-level UNet, counted from the bottom: 8, 16, 32, 64 latent pixels a side.
    sides = [8 * 2 ** int(layer.split(".")[1]) for layer in config.layers]
    widths = [block.gamma.numel() for block in blocks]
    assert widths == [1280, 640, 640, 320]
    features = sum(w * side**2 for w, side in zip(widths, sides, strict=True))
    trained = sum(p.numel() for p in blocks.parameters())
    if not rank:
        assert trained == pytest.approx(51.2e6, rel=1e-2)  # the paper's count
    assert 2 * (trained + features) < megabytes * 1e6
