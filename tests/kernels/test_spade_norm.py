import math

import pytest
import torch
import torch.nn.functional as F
from pfstorer_rt.kernels import reference
from pfstorer_rt.kernels.spade_norm import CHUNKS, PIXELS, spade_norm

# (batch, channels, height, width, groups): groups of 1, 3 and 10 channels; a tile and one more, of pixels and channels.
SHAPES = [(1, 3, 1, 1, 1), (3, 60, 3, 17, 6), (1, 65, 5, 13, 65), (1, 30, PIXELS + 1, 1, 10), (3, 16, 7, 11, 2)]
FULL = [(1, 320, 64, 64, 32), (4, 640, 32, 32, 32), (8, 1280, 16, 16, 32), (1, 128, 512, 512, 32)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FORMATS = [torch.channels_last, torch.contiguous_format]


def call(function, groups, silu):
    return lambda x, weight, bias, scale=None, shift=None: function(x, weight, bias, groups, 1e-5, scale, shift, silu)


def make(normal, shape, dtype, memory_format, modulated=True):
    b, c, h, w, _ = shape
    maps = [normal(b, c, h, w, dtype=dtype).contiguous(memory_format=memory_format) for _ in range(4)]
    more = maps[1:3] if modulated else [None, None]
    return [maps[0], normal(c, dtype=dtype), normal(c, dtype=dtype), *more], maps[3]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + [pytest.param(s, marks=pytest.mark.gpu) for s in FULL])
def test_spade_norm(shape, dtype, memory_format, normal, differentiate, assert_close):
    tensors, grad = make(normal, shape, dtype, memory_format)
    groups = shape[-1]
    found = differentiate(call(spade_norm, groups, True), tensors, grad)
    wide = [t.float() for t in tensors]
    expected = differentiate(call(reference.spade_norm, groups, True), wide, grad.float())
    # All is fp32 and rounded once. Of its own each sum has an error of some fp32 epsilons of its terms, which are of
    # the order of one, or where a group has a single value (variance 0), of 1 / sqrt(eps) = 316.
    pixels = shape[2] * shape[3]
    values = pixels * shape[1] // groups
    # Statistics are summed by pairs, whose error grows with the logarithm of their number.
    fp32 = 2**-23 * (316 if values < 4 else max(1.0, math.log2(values) / 8))
    sums = fp32 * 16 * max(shape[0] * pixels, 4) ** 0.5
    slacks = fp32 * 64, fp32 * 128, sums, sums, fp32 * 64, fp32 * 64
    for one, other, slack in zip(found, expected, slacks, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, slack)
    assert found[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("silu", [True, False])
def test_without_modulation_it_is_group_norm(silu, normal, differentiate, assert_close):
    tensors, grad = make(normal, (3, 60, 3, 17, 6), torch.float16, torch.channels_last, modulated=False)
    found = differentiate(call(spade_norm, 6, silu), tensors, grad)

    def group_norm(x, weight, bias, *_):
        y = F.group_norm(x, 6, weight, bias, 1e-5)
        return F.silu(y) if silu else y

    wide = [t if t is None else t.double() for t in tensors]
    for one, other in zip(found, differentiate(group_norm, wide, grad.double()), strict=True):
        assert_close(one, other.float(), 1e-4)


def test_scale_zero_and_shift_zero_change_nothing(normal):
    (x, weight, bias, scale, shift), _ = make(normal, (2, 12, 5, 7, 3), torch.float16, torch.channels_last)
    plain = spade_norm(x, weight, bias, 3)
    assert torch.equal(spade_norm(x, weight, bias, 3, 1e-5, 0 * scale, 0 * shift), plain)
    assert not torch.equal(spade_norm(x, weight, bias, 3, 1e-5, scale, shift), plain)


def test_a_large_mean_costs_no_precision(normal, assert_close):
    # Mean 3000, deviation about 1: E[x^2] - E[x]^2 in fp32 would be off by 1 in a variance of 1. More tiles than are
    # put together at a time.
    pixels = PIXELS * (CHUNKS + 2) + 5
    x = (normal(1, 4, pixels, 1, dtype=torch.float32) + 3000).half()
    weight, bias = normal(4), normal(4)
    expected = F.group_norm(x.double(), 2, weight.double(), bias.double(), 1e-5)
    assert_close(spade_norm(x, weight, bias, 2), expected.float(), 1e-3)


def test_strided_maps_give_the_same(normal, assert_close):
    x, weight, bias = normal(2, 8, 9, 12)[:, :, 1:8, 2:9], normal(8), normal(8)
    scale, shift = normal(1, 8, 7, 7).expand(2, -1, -1, -1), normal(2, 7, 7, 8).permute(0, 3, 2, 1)
    expected = reference.spade_norm(*(t.float() for t in (x, weight, bias)), 4, 1e-5, scale.float(), shift.float())
    assert_close(spade_norm(x, weight, bias, 4, 1e-5, scale, shift), expected, 1e-4)


def test_unsupported_calls_are_refused(normal):
    (x, weight, bias, scale, _), _ = make(normal, (1, 6, 2, 2, 3), torch.float16, torch.channels_last)
    with pytest.raises(ValueError, match="together"):
        spade_norm(x, weight, bias, 3, scale=scale)
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4"):
        spade_norm(x, weight, bias, 4)
