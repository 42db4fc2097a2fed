"""`pfstorer_rt.ops`: all backends agree, and a refused backend has a reason."""

import sys
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from pfstorer_rt.kernels import dispatch, tuning
from torch import nn

from pfstorer_rt import ops as door
from pfstorer_rt.config import Attention, RestoreConfig
from pfstorer_rt.errors import MissingBackendError
from pfstorer_rt.files import atomic_write
from pfstorer_rt.models.personalization import PersonalizationBlock
from pfstorer_rt.models.unet import Spade
from pfstorer_rt.runtime.restorer import Restorer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape, seed=0, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture(scope="module")
def triton():
    return door.choose("triton", DEVICE).kernels


# ---- choosing


def test_auto_chooses_sdpa_on_a_cpu():
    assert door.choose("auto", "cpu").name == "sdpa"
    assert list(door.BACKENDS).index("sdpa") < list(door.BACKENDS).index("triton")


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="'flash': expected auto or one of sdpa, triton"):
        door.choose("flash")


def test_triton_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingBackendError, match="not installed: pip install"):
        door.choose("triton", "cuda")


def test_triton_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch.INTERPRETED, "value", False)
    with pytest.raises(MissingBackendError, match=r"needs a CUDA device, this is cpu; with TRITON_INTERPRET=1"):
        door.choose("triton", "cpu")


@pytest.mark.parametrize("capability,refused", [((7, 5), True), ((8, 0), False), ((9, 0), False), ((12, 0), False)])
def test_triton_is_refused_on_old_gpus(capability, refused, monkeypatch):
    monkeypatch.setattr(dispatch.INTERPRETED, "value", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if refused:
        with pytest.raises(MissingBackendError, match=r"7\.5; its kernels need 8\.0"):
            door.choose("triton", "cuda")
    else:
        assert door.choose("triton", "cuda").name == "triton"


def test_triton_is_refused_for_unsupported_head_sizes(nano_base):
    for size in (31, 129):
        with pytest.raises(MissingBackendError, match=f"heads of {size} channels; .* takes 32 to 128"):
            door.choose("triton", DEVICE, size)
    with pytest.raises(MissingBackendError, match="heads of 8 channels"):
        nano_base.set_attention("triton")


def test_the_command_line_names_every_backend():
    assert get_args(Attention) == ("auto", *door.BACKENDS)


def test_a_restorer_uses_the_given_backend(nano_base, nano_identity, make_image, monkeypatch):
    calls = []

    def counting(q, k, v, mask=None):
        calls.append(q.shape)
        return door.sdpa(q, k, v, mask)

    monkeypatch.setitem(door.BACKENDS, "reference", lambda device, head_size: door.Kernels(counting))
    pixels, config = make_image(64, 64), RestoreConfig(steps=1)
    with Restorer.from_base(nano_base, nano_identity, device="cpu", attention="reference") as restorer:
        found = restorer.restore(pixels, config)
    with_person = len(calls)
    with Restorer.from_base(nano_base, device="cpu", attention="reference") as restorer:
        restorer.restore(pixels, config)
    blocks = sum(bool(g["max"]) for g in nano_identity.gamma.values())
    assert with_person - (len(calls) - with_person) >= blocks > 0  # the person's blocks go through it too
    count = len(calls)
    with Restorer.from_base(nano_base, nano_identity, device="cpu") as restorer:
        assert np.array_equal(restorer.restore(pixels, config), found)
    assert len(calls) == count  # and are back on `auto` for the next


# ---- computing


@pytest.mark.parametrize("name", ["sdpa", "math", "reference", "triton"])
@pytest.mark.parametrize("masked", [False, True])
def test_backends_agree(name, masked):
    attend = door.choose(name, DEVICE).kernels.attention
    q, k, v = (normal(2, 3, n, 40, seed=i) for i, n in enumerate((9, 21, 21)))
    mask = (normal(2, 1, 1, 21) > 0) if masked else None
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    assert (attend(q, k, v, mask) - expected).abs().max() < 4e-3  # four roundings of numbers of order one


def test_a_block_ignores_masked_tokens(triton):
    block = make_block(64, triton)
    x, reference = normal(2, 12, 64), normal(2, 9, 64, seed=1)
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.bool, device=DEVICE)
    masked = block(x, reference, kept.expand(2, -1))
    assert (masked - block(x, reference[:, kept])).abs().max() < 5e-3
    assert (masked - block(x, reference)).abs().max() > 2e-2


def make_block(channels, kernels, rank=0):
    torch.manual_seed(4)
    block = PersonalizationBlock(channels, 32, rank).to(DEVICE, torch.float16).eval().requires_grad_(False)
    nn.init.normal_(block.gamma)
    block.set_kernels(kernels)
    return block


@pytest.mark.parametrize("rank", [0, 4])
def test_a_block_with_kernels_agrees_with_the_plain_block(rank, triton):
    x, reference = normal(2, 17, 64), normal(2, 21, 64, seed=1)
    found = make_block(64, triton, rank)(x, reference, strength=0.6)
    exact = make_block(64, door.Kernels(), rank).double()(x.double(), reference.double(), strength=0.6)
    assert (found - exact).abs().max() < 1e-2  # of values up to 5, after seven layers of halves
    assert (exact - x).abs().max() > 0.3


@pytest.mark.parametrize("strength", [0.0, torch.zeros(1), torch.zeros(2, 1, 1)])
def test_strength_zero_and_gamma_zero_return_the_input_bit_for_bit(strength, triton):
    block = make_block(64, triton)
    x, reference = normal(2, 17, 64), normal(2, 21, 64, seed=1)
    x[0, 0, 0] = -0.0
    strength = strength.to(DEVICE) if isinstance(strength, torch.Tensor) else strength
    assert torch.equal(block(x, reference, strength=strength).view(torch.int16), x.view(torch.int16))
    assert not torch.equal(block(x, reference), x)
    block.gamma.zero_()
    assert torch.equal(block(x, reference).view(torch.int16), x.view(torch.int16))


def test_a_block_with_kernels_can_be_trained(triton):
    grads = []
    for kernels, dtype in ((triton, torch.float16), (door.Kernels(), torch.float64)):
        block = make_block(64, kernels).to(dtype).requires_grad_(True)
        block(normal(2, 17, 64).to(dtype), normal(2, 21, 64, seed=1).to(dtype)).float().square().mean().backward()
        grads.append({n: p.grad.double() for n, p in block.named_parameters()})
    for name, exact in grads[1].items():
        assert (grads[0][name] - exact).abs().max() < 2e-2 * exact.abs().max() + 2e-6, name


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_spade_with_kernels_agrees_with_plain_spade(memory_format, triton):
    torch.manual_seed(0)
    spade = Spade(12, 6, 5, 4).to(DEVICE)
    h, structure = normal(2, 12, 7, 9, dtype=torch.float32), normal(2, 6, 7, 9, seed=1, dtype=torch.float32)
    h = h.contiguous(memory_format=memory_format)
    with torch.no_grad():
        plain = spade(h, structure)
        spade.kernels = triton
        assert (spade(h, structure) - plain).abs().max() < 1e-5
    assert spade(h, structure).is_contiguous(memory_format=memory_format)


def test_geglu_agrees_with_the_layer_of_diffusers(triton):
    layer = GEGLU(8, 12).to(DEVICE)
    x = normal(2, 5, 8, dtype=torch.float32)
    for kernels in (door.Kernels(), triton):
        assert (kernels.geglu(layer.proj(x)) - layer(x)).abs().max() < 1e-6


# ---- deciding


@pytest.fixture
def make_dispatch(tmp_path, monkeypatch):
    """Function (*milliseconds, gpu) -> a dispatch whose implementations take these times, PyTorch's first."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def make(*milliseconds, gpu="Some GPU"):
        times, file = iter(milliseconds), tmp_path / "cache" / "kernels.json"
        made = dispatch.Dispatch(file, atomic_write)
        made.tuner = tuning.Tuner(file, atomic_write, lambda way: next(times), gpu)
        return made

    return make


def run_geglu(made):
    """Return the implementation that a call used; the plain one returns zeros."""
    x = normal(3, 8)
    out = made.geglu(lambda: torch.zeros(3, 4), x)
    return "torch" if not out.any() else "triton"


@pytest.mark.parametrize("times,taken", [((0.2, 0.1), "triton"), ((0.1, 0.2), "torch"), ((0.1, float("inf")), "torch")])
def test_the_faster_implementation_is_chosen(times, taken, make_dispatch):
    made = make_dispatch(*times)
    assert run_geglu(made) == taken == run_geglu(made)  # the second time there is no clock left
    ((key, decision),) = made.decisions.items()
    assert key == "geglu float16 8 rows 4" and decision.startswith(f"{taken}: torch {times[0]:.4f} ms")


@pytest.mark.parametrize(("times", "taken"), [((0.2, 0.1), "triton"), ((0.1, 0.2), "torch"), ((), "torch")])
def test_while_a_graph_is_captured_the_earlier_choice_holds(times, taken, make_dispatch, monkeypatch):
    made = make_dispatch(*times)
    if times:
        run_geglu(made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run_geglu(made) == taken


def test_timings_are_saved_on_disk(make_dispatch):
    assert run_geglu(make_dispatch(0.1, 0.2)) == "torch"
    assert run_geglu(make_dispatch()) == "torch"
    assert run_geglu(make_dispatch(0.2, 0.1, gpu="Another GPU")) == "triton"
    assert len(make_dispatch().tuner.known) == 2


def test_a_damaged_file_of_timings_counts_as_empty(make_dispatch):
    made = make_dispatch(0.2, 0.1)
    made.tuner.file.parent.mkdir()
    for text in ("{", "[1]", '{"a": {"fastest": 1}}'):
        made.tuner.file.write_text(text)
        assert run_geglu(make_dispatch(0.2, 0.1)) == "triton"


def test_timings_that_cannot_be_saved_are_used(make_dispatch):
    made = make_dispatch(0.1, 0.2)
    made.tuner.file.parent.write_text("a file where the folder should be")
    assert run_geglu(made) == "torch" == run_geglu(made)


def test_attention_prefers_cudnn_on_hopper(monkeypatch):
    for capability, expected in (((8, 9), door.sdpa), ((9, 0), door.cudnn_first)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert door.choose("sdpa", "cuda").kernels.attention is expected
    q, k, v = (normal(1, 2, 5, 8, dtype=torch.float32).cpu() for _ in range(3))
    assert torch.equal(door.cudnn_first(q, k, v), door.sdpa(q, k, v))


@pytest.mark.parametrize(
    "shape,dtype,mask,reason",
    [
        ((2, 3, 9, 40), torch.float32, None, "fp16 and bf16, these are float32"),
        ((2, 3, 9, 24), torch.float16, None, "head sizes are 32 to 128, this is 24"),
        ((2, 3, 9, 40), torch.float16, (2, 1, 9, 9), "differs among heads or queries"),
        ((2, 3, 9, 40), torch.float16, (9, 9), "differs among heads or queries"),
    ],
)
def test_sdpa_is_preferred_with_a_reason(shape, dtype, mask, reason, make_dispatch):
    made = make_dispatch()
    q, k, v = (normal(*shape, seed=i, dtype=dtype) for i in range(3))
    keep = None if mask is None else torch.ones(mask, dtype=torch.bool, device=DEVICE).tril()
    assert torch.equal(made.attention(q, k, v, keep), F.scaled_dot_product_attention(q, k, v, attn_mask=keep))
    assert reason in next(iter(made.decisions.values()))


def test_mixed_types_use_the_plain_gate(make_dispatch):
    layer, x = nn.Linear(8, 4).to(DEVICE), normal(2, 3, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        arguments = normal(2, 3, 8), layer, x, 2 * x, x[0, 0]
        plain = partial(door.gated_projection, *arguments)
        made = make_dispatch()
        found = made.gated_projection(plain, *arguments)
        assert torch.equal(found, plain())
    assert "fp16 or bf16 throughout" in next(iter(made.decisions.values()))


def test_norms_with_hooks_use_the_plain_implementation(make_dispatch):
    norm = nn.GroupNorm(2, 4).to(DEVICE)
    norm.register_forward_pre_hook(lambda _, inputs: None)
    made, x = make_dispatch(), normal(1, 4, 3, 3, dtype=torch.float32)
    assert torch.equal(made.spade_norm(partial(door.spade_norm, norm, x), norm, x, None, None, False), norm(x))
    assert "types of its own" in next(iter(made.decisions.values()))
