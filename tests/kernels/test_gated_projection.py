import pytest
import torch
from pfstorer_rt.kernels import reference
from pfstorer_rt.kernels.gated_projection import TILES, gated_projection

# (batch, tokens, inner channels, channels): 1, 3, 17, 77, a tile and one more.
SHAPES = [(1, 1, 1, 1), (3, 17, 77, 3), (1, 65, 65, 65), (3, 77, 40, 17), (1, 3, 129, 130)]
FULL = [(1, 4096, 1280, 320), (4, 1024, 2560, 640), (16, 256, 5120, 1280)]
DTYPES = [torch.float16, torch.bfloat16]


def make(normal, shape, dtype):
    """h, weight, bias, stream, x, gamma, strength; gamma and strength stay fp32, as in training."""
    b, length, k, n = shape
    return [
        normal(b, length, k, dtype=dtype),
        normal(n, k, dtype=dtype),
        normal(n, dtype=dtype),
        normal(b, length, n, dtype=dtype),
        normal(b, length, n, dtype=dtype),
        normal(n, dtype=torch.float32),
        normal(b, 1, 1, dtype=torch.float32),
    ]


def slacks(tensors, grad, differentiate):
    """Largest error allowed in each result: its sum over absolute terms, times the epsilon of the type.

    The product is summed in fp32 and rounded once, with the output. The backward rounds twice more before a sum: the
    gradient that enters the projection, and the projection that is computed again for gamma and strength.
    An x of the opposite sign makes `y - x` a sum of absolute terms, too.
    """
    sizes = [t.float().abs() for t in tensors]
    sizes[4] = -sizes[4]
    absolute = differentiate(reference.gated_projection, sizes, grad.float().abs())
    u = torch.finfo(tensors[0].dtype).eps
    fp32 = torch.finfo(torch.float32).eps * max(tensors[0].shape)
    return [
        fp32 * absolute[0].abs().max(),
        *(u * size.abs() for size in absolute[1:5]),
        u * (2 + absolute[5].abs()),
        *(u * size.abs() for size in absolute[6:]),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + [pytest.param(s, marks=pytest.mark.gpu) for s in FULL])
def test_gated_projection(shape, dtype, normal, differentiate, assert_close):
    tensors = make(normal, shape, dtype)
    grad = normal(*tensors[3].shape, dtype=dtype)
    found = differentiate(gated_projection, tensors, grad)
    wide = [t.float() for t in tensors]
    expected = differentiate(reference.gated_projection, wide, grad.float())
    for i, slack in enumerate(slacks(tensors, grad, differentiate)):
        assert_close(found[i], expected[i], slack)
        assert i == 0 or found[i].dtype == tensors[i - 1].dtype


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_gives_the_same(tile, normal, assert_close):
    tensors = make(normal, (1, 300, 70, 130), torch.float16)
    assert_close(gated_projection(*tensors, tile), reference.gated_projection(*(t.float() for t in tensors)), 1e-4)


def test_gated_projection_is_eq_3_of_the_paper(normal, assert_close):
    # F + strength gamma (.) (Block(F) - F), where Block ends in "stream + projection".
    h, weight, bias, stream, x, gamma, _ = make(normal, (3, 17, 77, 40), torch.float16)
    block = torch.nn.functional.linear(h.double(), weight.double(), bias.double()) + stream.double()
    expected = x.double() + 0.7 * gamma.double() * (block - x.double())
    assert_close(gated_projection(h, weight, bias, stream, x, gamma, 0.7), expected.float(), 1e-4)


def test_a_closed_gate_returns_the_bits_of_x(normal):
    h, weight, bias, stream, x, gamma, strength = make(normal, (3, 17, 40, 65), torch.float16)
    x.view(-1)[::2] = -0.0  # -0 + 0 is +0: an addition would show
    bias[::3] = float("inf")  # and so would zero times infinity
    gamma[::3] = 0
    out = gated_projection(h, weight, bias, stream, x, gamma, strength)
    bits = (out.view(torch.int16) == x.view(torch.int16)).all((0, 1))
    assert bits[::3].all() and not bits[1::3].any()
    out = gated_projection(h, weight, bias, stream, x, gamma, 0 * strength)
    assert torch.equal(out.view(torch.int16), x.view(torch.int16))


def test_strength_of_each_row_without_a_bias(normal, assert_close):
    h, weight, _, stream, x, gamma, strength = make(normal, (3, 17, 40, 65), torch.bfloat16)
    out = gated_projection(h, weight, None, stream, x, gamma, strength)
    for i in range(3):
        row = slice(i, i + 1)
        one = gated_projection(h[row], weight, None, stream[row], x[row], gamma, strength[i].item())
        assert torch.equal(out[i], one[0])
    wide = [t.float() for t in (stream, x)]
    assert_close(out, reference.gated_projection(h.float(), weight.float(), None, *wide, gamma, strength), 1e-4)


def test_strided_inputs_give_the_same(normal, assert_close):
    h, weight, bias, stream, x, gamma, strength = make(normal, (2, 17, 40, 24), torch.float16)
    h = h.transpose(1, 2).contiguous().transpose(1, 2)
    x = torch.cat([x, x], -1)[..., :24]
    weight = weight.T.contiguous().T
    assert not any(t.is_contiguous() for t in (h, x, weight))
    tensors = [h, weight, bias, stream, x, gamma, strength]
    expected = reference.gated_projection(*(t.float() for t in tensors))
    assert_close(gated_projection(*tensors), expected, 1e-4)


def test_mixed_types_are_refused(normal):
    tensors = make(normal, (1, 3, 4, 5), torch.float16)
    tensors[1] = tensors[1].float()
    with pytest.raises(ValueError, match=r"weight.*float32.*cast"):
        gated_projection(*tensors)
