import pytest
import torch
import torch.nn.functional as F
from pfstorer_rt.kernels import reference
from pfstorer_rt.kernels.attention import FORWARD_TILES, HEAD_SIZES, attention, compact

# (batch, heads, queries, keys, head size): 1, 3, 17, 77, a tile and one more; heads between powers of two.
SHAPES = [
    (1, 1, 1, 1, 32),
    (1, 2, 3, 17, 40),
    (3, 2, 17, 77, 40),
    (1, 1, 65, 3, 64),
    (1, 2, 64, 64, 64),
    (3, 1, 77, 65, 64),
    (1, 1, 129, 129, 128),
    (1, 1, 17, 130, 80),
]
FULL = [(1, 10, 4096, 4096, 64), (4, 20, 1024, 1024, 64), (16, 20, 256, 77, 64), (2, 8, 4096, 3001, 40)]
DTYPES = [torch.float16, torch.bfloat16]


def slacks(q, k, v, grad, mask=None):
    """How far out, dq, dk, dv may be off: the terms of their sums, by the half that each was rounded to.

    Rounded are: the weights p before p v and p^T g; ds before ds k and ds^T q; out, in g . out, of which ds is
    made. Each rounding moves its value by at most half an epsilon; twice that leaves room for exp2 and the order of
    sums. Weights under the smallest half, 2^-24, may vanish: hence the constant.
    """
    u = torch.finfo(q.dtype).eps
    q, k, v, grad = (t.float() for t in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale
    p = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
    dp, out = grad @ v.transpose(-1, -2), p @ v
    error = p * ((dp - (grad * out).sum(-1, keepdim=True)).abs() + (grad * out).abs().sum(-1, keepdim=True))
    tiny = 2**-24 * max(scores.shape[-2:]) * 4
    sums = (
        p @ v.abs(),
        scale * error @ k.abs(),
        scale * error.transpose(-1, -2) @ q.abs(),
        p.transpose(-1, -2) @ grad.abs(),
    )
    return [u * size + tiny for size in sums]


def check(tensors, grad, mask, keys, differentiate, assert_close, tile=None):
    found = differentiate(lambda q, k, v: attention(q, k, v, keys, tile), tensors, grad)
    wide = [t.float() for t in (*tensors, grad)]
    expected = differentiate(lambda q, k, v: reference.attention(q, k, v, mask), wide[:3], wide[3])
    for one, other, slack in zip(found, expected, slacks(*tensors, grad, mask), strict=True):
        assert one.dtype == grad.dtype
        assert_close(one, other, slack)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + [pytest.param(s, marks=pytest.mark.gpu) for s in FULL])
def test_attention(shape, dtype, normal, differentiate, assert_close):
    b, h, length, s, d = shape
    tensors = [normal(b, h, n, d, dtype=dtype) for n in (length, s, s)]
    check(tensors, normal(b, h, length, d, dtype=dtype), None, None, differentiate, assert_close)


@pytest.mark.parametrize("tile", sorted({tile for tiles in FORWARD_TILES.values() for tile in tiles}))
def test_every_tile_gives_the_same(tile, normal, differentiate, assert_close):
    tensors = [normal(1, 1, n, 64) for n in (130, 131, 131)]
    check(tensors, normal(1, 1, 130, 64), None, None, differentiate, assert_close, tile)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_are_left_out(dtype, normal, differentiate, assert_close):
    b, h, length, s, d = 3, 2, 17, 77, 40
    tensors = [normal(b, h, n, d, dtype=dtype) for n in (length, s, s)]
    mask = normal(b, s) > 0.3
    mask[1] = True
    mask[2] = False
    mask[2, 76] = True  # only the last
    for t in tensors[1:]:
        t.masked_fill_(~mask[:, None, :, None], 1e4)  # would show, were it looked at
    grad = normal(b, h, length, d, dtype=dtype)
    found = check(tensors, grad, mask[:, None, None], compact(mask), differentiate, assert_close)
    for gradient in found[2:]:
        assert not gradient.masked_select(~mask[:, None, :, None]).any()


def test_a_row_without_keys_gives_zeros(normal, differentiate):
    tensors = [normal(2, 1, n, 32) for n in (5, 9, 9)]
    mask = torch.ones(2, 9, dtype=torch.bool, device=tensors[0].device)
    mask[0] = False
    found = differentiate(lambda q, k, v: attention(q, k, v, compact(mask)), tensors, normal(2, 1, 5, 32))
    assert all(not t[0].any() and bool(t.isfinite().all()) and t[1].any() for t in found)


def test_compaction_keeps_the_order():
    mask = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    positions, lengths = compact(mask)
    assert lengths.tolist() == [3, 1] and positions[0, :3].tolist() == [1, 2, 4] and positions[1, 0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_same(dtype, normal, differentiate, assert_close):
    # Heads cut from one projection of q, k and v together; a value whose last axis is not dense; an expanded key.
    q, k, v = normal(3, 17, 3, 2, 40, dtype=dtype).permute(2, 0, 3, 1, 4)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    k = k[:1].expand(3, -1, -1, -1)
    assert v.stride(-1) != 1 and k.stride(0) == 0
    check([q, k, v], normal(3, 2, 40, 17, dtype=dtype).transpose(-1, -2), None, None, differentiate, assert_close)


def test_merging_the_heads_copies_nothing(normal):
    out = attention(*(normal(2, 3, 5, 32) for _ in range(3)))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_scores_beyond_the_largest_half(normal, assert_close):
    # All keys alike and large, as on a flat grey tile: q . k passes 65504, and a half would be infinite.
    q, k = normal(1, 1, 17, 64) * 0 + 200, normal(1, 1, 33, 64) * 0.01 + 200
    v = normal(1, 1, 33, 64)
    assert (q[0, 0, 0].float() @ k[0, 0, 0].float()) > 65504
    out = attention(q, k, v)
    wide = [t.float() for t in (q, k, v)]
    # Scores of 3e5 carry an fp32 error of 0.03 before the exponential: 0.06 of each weight.
    assert_close(out, F.scaled_dot_product_attention(*(t.double() for t in wide)).float(), 0.06 * 4)
    assert out.isfinite().all()


def test_unsupported_head_sizes_and_types_are_refused(normal):
    for d in (HEAD_SIZES.start - 1, HEAD_SIZES.stop):
        with pytest.raises(ValueError, match=rf"head sizes are 32 to 128, this is {d}; use scaled_dot"):
            attention(*(normal(1, 1, 4, d) for _ in range(3)))
    with pytest.raises(ValueError, match="float32"):
        attention(*(normal(1, 1, 4, 64, dtype=torch.float32) for _ in range(3)))


@pytest.mark.parametrize("change", ["heads", "head size", "batch", "length", "type"])
def test_tensors_that_do_not_go_together_are_refused(normal, change):
    q, k, v = (normal(2, 3, 17, 32, dtype=torch.float16) for _ in range(3))
    k, v = {
        "heads": (k[:, :1], v[:, :1]),
        "head size": (k[..., :16], v[..., :16]),
        "batch": (k[:1], v[:1]),
        "length": (k, v[:, :, :5]),
        "type": (k.bfloat16(), v),
    }[change]
    with pytest.raises(ValueError, match="expected"):
        attention(q, k, v)
