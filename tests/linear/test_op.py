import pytest
import torch

from mfkernels import Dual, Linear, linear
from mfkernels.testing import assert_dual

# measured: 1.5e-16, 1.1e-7, 1.9e-3
BOUNDS = [(torch.float64, 3e-16), (torch.float32, 2.2e-7), (torch.bfloat16, 4e-3)]


def oracle(x, weight, bias=None):
    y = torch.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + bias


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("shape", [(4, 24), (3, 5, 24), (1, 1, 24)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_against_float64(shape, has_bias, dtype, bound):
    inputs = {"x": torch.randn(shape, dtype=torch.float64), "weight": torch.randn(17, 24, dtype=torch.float64)}
    if has_bias:
        inputs["bias"] = torch.randn(17, dtype=torch.float64)
    assert_dual(linear, oracle, inputs, duals=["x"], dtype=dtype, bound=bound)


def test_bias_is_not_added_to_the_tangent():
    x, w, b = torch.randn(2, 3), torch.randn(5, 3), torch.full((5,), 100.0)
    y = linear(Dual(x, torch.zeros(2, 3)), w, b)
    assert y.tangent.abs().max() == 0


def test_module_is_torch_linear_on_tensors():
    layer = Linear(6, 4)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert list(layer.state_dict()) == ["weight", "bias"]


X, W = torch.randn(2, 4), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("x", "bias", "error", "match"),
    [
        (torch.randn(2, 3), None, ValueError, "x: expected last size 4"),
        (X, torch.randn(4), ValueError, "bias: expected shape"),
        (torch.arange(4), None, TypeError, "x: expected a floating-point"),
        ("no", None, TypeError, "x: expected a tensor or a Dual, got str"),
        (Dual(X, torch.randn(3, 4)), None, ValueError, "x.tangent: expected at most 2"),
        (Dual(X, torch.randn(1, 3)), None, ValueError, "x.tangent: expected shape"),
        (Dual(X, torch.randn(1, 4).double()), None, TypeError, "x.tangent: expected the primal's dtype"),
        (Dual(X, torch.randn(1, 4).requires_grad_()), None, ValueError, "must not require grad"),
        (Dual(X, torch.randn(1, 4, device="meta")), None, ValueError, "x.tangent: expected the primal's device"),
    ],
)
def test_bad_arguments(x, bias, error, match):
    with pytest.raises(error, match=match):
        linear(x, W, bias)
