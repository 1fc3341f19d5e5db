import pytest
import torch

from mfkernels import Dual, layer_scale_residual, use_backend
from mfkernels.testing import assert_dual


def oracle(x, y, scale):
    return x + y * scale


def make(*shape, dtype=torch.float64):
    return {
        "x": torch.randn(shape, dtype=dtype),
        "y": torch.randn(shape, dtype=dtype),
        "scale": torch.randn(shape[-1], dtype=dtype),
    }


SHAPES = [(4, 7, 24), (2, 1, 2730), (3, 5, 2, 9), (4, 9), (1, 1, 3), (2, 276, 48), (2, 2, 768), (1, 3, 1152)]


# measured: 1.7e-16, 1.1e-7, 2.6e-3; 1.8e-7, 3.7e-4, 4.3e-3
# (the interpreter cuts bfloat16 off where a GPU rounds it: twice the error)
CASES = [
    ("reference", torch.float64, 3.4e-16),
    ("reference", torch.float32, 2.2e-7),
    ("reference", torch.bfloat16, 5.2e-3),
    ("triton", torch.float32, 3.6e-7),
    ("triton", torch.float16, 7.5e-4),
    ("triton", torch.bfloat16, 9e-3),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)  # with seed 0 the dual check would draw the inputs again, as their tangents


@pytest.fixture(params=["reference", "triton"])
def backend(request, poison_empty):
    with use_backend(request.param), torch.device(DEVICE):
        yield request.param


@pytest.fixture(params=CASES, ids=str)
def case(request, poison_empty):
    """(dtype, bound) of one backend."""
    backend, dtype, bound = request.param
    with use_backend(backend):
        yield dtype, bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("duals", ["xy", "x", "y"])
def test_against_float64(duals, shape, case):
    dtype, bound = case
    assert_dual(layer_scale_residual, oracle, make(*shape), duals=duals, dtype=dtype, bound=bound, device=DEVICE)


def test_tangents_of_different_rows(backend):
    m = make(4, 3, 8, dtype=torch.float32)
    x_dot, y_dot = torch.randn(1, 3, 8), torch.randn(3, 3, 8)
    out = layer_scale_residual(Dual(m["x"], x_dot), Dual(m["y"], y_dot), m["scale"])
    padded = torch.cat([x_dot, torch.zeros(2, 3, 8)])
    torch.testing.assert_close(out.tangent, padded + y_dot * m["scale"])


def test_the_scale_may_be_wider_than_the_inputs(backend):
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    out = layer_scale_residual(Dual(x, x), Dual(x), torch.randn(24))
    assert out.primal.dtype == out.tangent.dtype == torch.bfloat16


def test_the_backward_keeps_y_and_the_scale(backend):
    x, y, scale = (a.float().requires_grad_() for a in make(4, 7, 24).values())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: saved.append(a.numel()) or a, lambda a: a):
        layer_scale_residual(Dual(x, x.detach()), Dual(y, y.detach()), scale)
    assert sum(saved) == y.numel() + scale.numel()


def test_bad_arguments(backend):
    x, scale = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"y: expected shape \(B, …, D\) of x"):
        layer_scale_residual(x, x[:1], scale)
    with pytest.raises(ValueError, match=r"scale: expected shape \(D,\) of x = \(8,\), got \(2, 8\)"):
        layer_scale_residual(x, x, x[:, 0])
    with pytest.raises(TypeError, match="y: expected the dtype of x"):
        layer_scale_residual(x, x.double(), scale)
    with pytest.raises(NotImplementedError, match="scale: a forward-mode tangent of a parameter"):
        torch.func.jvp(lambda s: layer_scale_residual(x, x, s), (scale,), (scale,))


def test_no_rows(backend):
    x = torch.randn(0, 3, 8)
    out = layer_scale_residual(Dual(x, x), x, torch.ones(8))
    assert out.primal.shape == out.tangent.shape == (0, 3, 8)
