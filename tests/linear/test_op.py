import pytest
import torch

from mfkernels import Dual, Linear, linear
from mfkernels.linear import op
from mfkernels.testing import assert_dual, relative_error

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


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_under_autocast_the_weights_keep_their_dtype(rows):
    """Float16 products of float32 weights: gradients in float32, as exact as autocast's own."""
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 7, 24), (40, 24), (40,)))
    x_dot, cotangent = torch.randn(rows, 7, 24), torch.randn(3, 7, 40).half()
    with torch.autocast("cpu", dtype=torch.float16):
        y = linear(Dual(x, x_dot), weight, bias)
        plain = torch.nn.functional.linear(x, weight, bias)
    assert y.primal.dtype == y.tangent.dtype == torch.float16
    assert torch.equal(y.primal, plain)
    wide = [a.detach().double().requires_grad_() for a in (x, weight, bias)]
    ref = torch.nn.functional.linear(*wide)
    if rows:
        assert relative_error(y.tangent, x_dot.double() @ wide[1].T) <= 8e-4  # measured 4e-4
    grads = torch.autograd.grad(y.primal, [x, weight, bias], cotangent)
    wanted = torch.autograd.grad(ref, wide, cotangent.double())
    theirs = torch.autograd.grad(plain, [x, weight, bias], cotangent)
    for g, g_ref, plainly in zip(grads, wanted, theirs, strict=True):
        assert g.dtype == torch.float32
        assert relative_error(g, g_ref) <= 1.1 * relative_error(plainly, g_ref)


def test_under_autocast_a_frozen_parameter_gets_no_gradient():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(x, weight).float().sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_opcheck():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((3, 7, 24), (40, 24), (40,)))
    for x_dot in (torch.randn(2, 7, 24), None):
        for b in (bias, None):
            for dtype in (torch.float32, torch.float16):
                torch.library.opcheck(op._forward.custom_op, (x, x_dot, weight, b, dtype))
