import pytest
import torch

from mfkernels import gated_residual, gated_residual_ada_layer_norm
from mfkernels.testing import assert_dual

# measured: alone 1.2e-16, 7.0e-8, 2.6e-3; with the norm 3.8e-16, 1.8e-7, 7.1e-3
BOUNDS = [(torch.float64, 2.4e-16), (torch.float32, 1.4e-7), (torch.bfloat16, 5.2e-3)]
BOUNDS_NORM = [(torch.float64, 7.6e-16), (torch.float32, 3.6e-7), (torch.bfloat16, 1.4e-2)]
SIZES = [(4, 7, 24), (3, 17, 48), (2, 1, 2730), (1, 5, 8)]


def oracle(x, y, gate):
    return x + gate[:, None] * y


def oracle_norm(x, y, gate, shift, scale):
    x = oracle(x, y, gate)
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-6) * (1 + scale[:, None]) + shift[:, None]


def make(B, N, D):
    gate, shift, scale = torch.randn(B, 6 * D, dtype=torch.float64).chunk(6, dim=1)[2:5]
    x, y = torch.randn(2, B, N, D, dtype=torch.float64)
    return {"x": x, "y": y, "gate": gate}, {"shift": shift, "scale": scale}


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("duals", [["x", "y", "gate"], ["x"], ["y"], ["gate"]])
def test_alone(size, duals, dtype, bound):
    assert_dual(gated_residual, oracle, make(*size)[0], duals=duals, dtype=dtype, bound=bound)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS_NORM)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("duals", [["x", "y", "gate", "shift", "scale"], ["gate", "shift"]])
def test_with_norm(size, duals, dtype, bound):
    residual, modulation = make(*size)
    inputs = {**residual, **modulation}
    both = [n for n in duals if n in residual]
    assert_dual(
        lambda **kw: gated_residual_ada_layer_norm(**kw)[1], oracle_norm, inputs, duals=duals, dtype=dtype, bound=bound
    )
    assert_dual(
        lambda **kw: gated_residual_ada_layer_norm(**kw, **{n: m.to(dtype) for n, m in modulation.items()})[0],
        oracle,
        residual,
        duals=both,
        dtype=dtype,
        bound=bound,
    )


def test_bad_arguments():
    residual, modulation = make(2, 3, 8)
    with pytest.raises(ValueError, match="y: expected shape"):
        gated_residual(residual["x"], residual["y"][:, :2], residual["gate"])
    with pytest.raises(ValueError, match="gate: expected shape"):
        gated_residual_ada_layer_norm(residual["x"], residual["y"], residual["gate"][:, :4], **modulation)
