import pytest
import torch

from mfkernels import Dual, layer_scale_residual, use_backend
from mfkernels.testing import assert_dual


def oracle(x, y, scale):
    return x + y * scale


def make(*shape):
    return {
        "x": torch.randn(shape, dtype=torch.float64),
        "y": torch.randn(shape, dtype=torch.float64),
        "scale": torch.randn(shape[-1], dtype=torch.float64),
    }


SHAPES = [(4, 7, 24), (2, 1, 2730), (3, 5, 2, 9), (4, 9), (1, 1, 3)]


@pytest.fixture(autouse=True)
def _reference():
    torch.manual_seed(1)  # with seed 0 the dual check would draw the inputs again, as their tangents
    with use_backend("reference"):
        yield


# measured: 1.7e-16, 7.5e-8, 2.6e-3
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 3.4e-16), (torch.float32, 1.5e-7), (torch.bfloat16, 5.2e-3)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("duals", ["xy", "x", "y"])
def test_against_float64(duals, shape, dtype, bound):
    assert_dual(layer_scale_residual, oracle, make(*shape), duals=duals, dtype=dtype, bound=bound)


def test_tangents_of_different_rows():
    m = make(4, 3, 8)
    x_dot, y_dot = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(3, 3, 8, dtype=torch.float64)
    out = layer_scale_residual(Dual(m["x"], x_dot), Dual(m["y"], y_dot), m["scale"])
    padded = torch.cat([x_dot, torch.zeros(2, 3, 8, dtype=torch.float64)])
    torch.testing.assert_close(out.tangent, padded + y_dot * m["scale"])


def test_the_scale_may_be_wider_than_the_inputs():
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    out = layer_scale_residual(Dual(x, x), Dual(x), torch.randn(24))
    assert out.primal.dtype == out.tangent.dtype == torch.bfloat16


def test_the_backward_keeps_y_and_the_scale():
    x, y, scale = (a.float().requires_grad_() for a in make(4, 7, 24).values())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: saved.append(a.numel()) or a, lambda a: a):
        layer_scale_residual(Dual(x, x.detach()), Dual(y, y.detach()), scale)
    assert sum(saved) == y.numel() + scale.numel()


def test_bad_arguments():
    x, scale = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"y: expected shape \(B, …, D\) of x"):
        layer_scale_residual(x, x[:1], scale)
    with pytest.raises(ValueError, match=r"scale: expected shape \(D,\) of x = \(8,\), got \(2, 8\)"):
        layer_scale_residual(x, x, x[:, 0])
    with pytest.raises(TypeError, match="y: expected the dtype of x"):
        layer_scale_residual(x, x.double(), scale)
    with pytest.raises(NotImplementedError, match="scale: a forward-mode tangent of a parameter"):
        torch.func.jvp(lambda s: layer_scale_residual(x, x, s), (scale,), (scale,))


def test_no_rows():
    x = torch.randn(0, 3, 8)
    out = layer_scale_residual(Dual(x, x), x, torch.ones(8))
    assert out.primal.shape == out.tangent.shape == (0, 3, 8)
