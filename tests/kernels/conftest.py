import pytest
import torch
from pfstorer_rt.kernels.interpreter import INTERPRETED


@pytest.fixture(scope="session")
def device():
    """Where kernels run: natively on a GPU, else in Triton's interpreter (set up in tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def normal(device):
    """Function (*shape, dtype=fp16) -> normal numbers, others at each call and the same in each run."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.float16):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return make


@pytest.fixture(scope="session")
def differentiate():
    """Function (f, tensors, grad) -> (f(*tensors), gradient of each tensor); tensors may be None."""

    def run(function, tensors, grad):
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        result = function(*leaves)
        grads = torch.autograd.grad(result, [t for t in leaves if t is not None], grad.to(result.dtype))
        return [result.detach(), *grads]

    return run


@pytest.fixture(scope="session")
def assert_close():
    """Function (found, expected in fp32, slack): one rounding to found's type is allowed, and `slack` beside it.

    A GPU rounds to the nearest, by half an epsilon at most; the interpreter cuts bf16 off, which is a whole one.
    """
    cut = torch.bfloat16 if INTERPRETED.value else None

    def check(found, expected, slack=0.0):
        assert found.shape == expected.shape and found.dtype != torch.float64
        rounding = torch.finfo(found.dtype).eps / (1 if found.dtype == cut else 2)
        bound = rounding * expected.abs() + slack + 1e-7
        excess = ((found.float() - expected).abs() / bound).max().item()
        assert excess <= 1, f"off by {excess:.2f} times the tolerance"  # a NaN fails too

    return check
