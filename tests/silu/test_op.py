import pytest
import torch

from mfkernels import Dual, silu
from mfkernels.testing import assert_dual


def oracle(x):
    return x / (1 + torch.exp(-x))


# measured: 2.6e-16, 2.1e-7, 3.0e-3
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 5.1e-16), (torch.float32, 4.2e-7), (torch.bfloat16, 6e-3)]
)
@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 24), (1, 1)])
def test_against_float64(shape, dtype, bound):
    x = 3 * torch.randn(shape, dtype=torch.float64)
    assert_dual(silu, oracle, {"x": x}, duals=["x"], dtype=dtype, bound=bound)


def test_zero_tangent_stays_none():
    assert silu(Dual(torch.randn(3, 4))).tangent is None


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x: expected a floating-point dtype"):
        silu(torch.arange(3))
