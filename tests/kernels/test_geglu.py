import pytest
import torch
from diffusers.models.activations import GEGLU
from pfstorer_rt.kernels import reference
from pfstorer_rt.kernels.geglu import BLOCK, geglu

SHAPES = [(1, 1, 1), (3, 17, 77), (1, 3, BLOCK), (1, 2, BLOCK + 1)]  # batch, tokens, channels
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FULL = [(1, 4096, 1280), (16, 256, 5120)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + [pytest.param(s, marks=pytest.mark.gpu) for s in FULL])
def test_geglu(shape, dtype, normal, differentiate, assert_close):
    *rows, inner = shape
    x, grad = 2 * normal(*rows, 2 * inner, dtype=dtype), normal(*rows, inner, dtype=dtype)
    found = differentiate(geglu, [x], grad)
    expected = differentiate(reference.geglu, [x.float()], grad.float())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, 1e-5)  # all is fp32 and rounded once; values reach some tens


def test_geglu_equals_the_layer_of_the_unet(normal, assert_close):
    layer = GEGLU(8, 12)
    x = normal(2, 5, 8, dtype=torch.float32).cpu()
    with torch.no_grad():
        assert_close(reference.geglu(layer.proj(x)), layer(x), 1e-6)


def test_strided_inputs_give_the_same(normal, assert_close):
    x = normal(3, 24, 17).transpose(1, 2)
    assert_close(geglu(x), reference.geglu(x.float()), 1e-5)
    wide = normal(3, 17, 64)[..., :48]
    assert_close(geglu(wide), reference.geglu(wide.float()), 1e-5)


def test_odd_channels_are_refused(normal):
    with pytest.raises(ValueError, match="even"):
        geglu(normal(2, 7))
