import oracles
import pytest
import torch
from both_backends import both, cases
from memory import saved_bytes
from op_checks import assert_tangents_of_different_rows

from mfkernels import Dual, layer_scale_residual


def make(*shape, dtype=torch.float64):
    return {
        "x": torch.randn(shape, dtype=dtype),
        "y": torch.randn(shape, dtype=dtype),
        "scale": torch.randn(shape[-1], dtype=dtype),
    }


SHAPES = [(4, 7, 24), (2, 1, 2730), (3, 5, 2, 9), (4, 9), (1, 1, 3), (2, 276, 48), (2, 2, 768), (1, 3, 1152)]
backend = both()
case = cases(
    reference=(2e-16, 2.3e-7, 5.8e-3),  # measured: 9.8e-17, 1.2e-7, 2.9e-3
    triton=(2.6e-7, 7.2e-4, 9.5e-3),  # 1.3e-7, 3.6e-4, 4.8e-3
)


@pytest.mark.parametrize(
    ("shape", "duals"), [(s, "xy") for s in SHAPES] + [(s, one) for s in SHAPES[:2] for one in "xy"]
)
def test_against_float64(duals, shape, case):
    case.check(layer_scale_residual, oracles.layer_scale_residual, make(*shape), duals)


def test_tangents_of_different_rows(case):
    inputs, rows = make(4, 3, 8), {"x": 1, "y": 3}
    assert_tangents_of_different_rows(layer_scale_residual, oracles.layer_scale_residual, inputs, rows, *case)


def test_the_scale_may_be_wider_than_the_inputs(backend):
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    out = layer_scale_residual(Dual(x, x), Dual(x), torch.randn(24))
    assert out.primal.dtype == out.tangent.dtype == torch.bfloat16


def test_the_backward_keeps_y_and_the_scale(backend):
    x, y, scale = (a.float().requires_grad_() for a in make(4, 7, 24).values())
    duals = Dual(x, torch.randn_like(x)), Dual(y, torch.randn_like(y))
    assert saved_bytes(lambda: layer_scale_residual(*duals, scale)) == y.nbytes + scale.nbytes


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
