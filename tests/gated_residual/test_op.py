import pytest
import torch

from mfkernels import gated_residual, gated_residual_ada_layer_norm
from mfkernels.testing import assert_dual

# measured: alone 8.3e-17, 1.0e-7, 2.7e-3; with the norm 3.2e-16, 4.4e-7, 1.1e-2
BOUNDS = [(torch.float64, 1.7e-16), (torch.float32, 2e-7), (torch.bfloat16, 5.4e-3)]
BOUNDS_NORM = [(torch.float64, 6.5e-16), (torch.float32, 8.9e-7), (torch.bfloat16, 2.2e-2)]
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
