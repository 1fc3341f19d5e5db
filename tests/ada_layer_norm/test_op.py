import pytest
import torch

from mfkernels import Dual, ada_layer_norm
from mfkernels.testing import assert_dual, relative_error


def oracle(x, shift, scale):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-6) * (1 + scale[:, None]) + shift[:, None]


def make(B, N, D, mean=0.0):
    modulation = torch.randn(B, 6 * D, dtype=torch.float64)
    shift, scale = modulation.chunk(6, dim=1)[1:3]  # strided views, as in a DiT block
    return {"x": torch.randn(B, N, D, dtype=torch.float64) + mean, "shift": shift, "scale": scale}


# measured: 2.3e-16, 1.1e-7, 4.0e-3
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 5e-16), (torch.float32, 2.2e-7), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("size", [(4, 7, 24), (3, 17, 48), (2, 1, 2730), (1, 5, 1152)])
@pytest.mark.parametrize("duals", [["x", "shift", "scale"], ["x"], ["shift"], ["scale"]])
def test_against_float64(size, duals, dtype, bound):
    assert_dual(ada_layer_norm, oracle, make(*size), duals=duals, dtype=dtype, bound=bound)


def test_large_mean():
    # x + 1e4 leaves 11 bits of the fluctuation in float32: the error is that of the input, both sides see the same one;
    # measured 5.7e-4
    assert_dual(
        ada_layer_norm,
        oracle,
        make(4, 7, 48, mean=1e4),
        duals=["x", "shift", "scale"],
        dtype=torch.float32,
        bound=1.2e-3,
    )


@pytest.mark.parametrize("deviation", [1.0, 0.03, 0.003])
def test_forward_mode_of_half_precision_inputs_that_hardly_vary(deviation):
    """PyTorch's own rule of layer_norm cubes rstd in float16, which overflows from 40 on."""
    m = make(3, 5, 64)
    low = [x.half() for x in (m["x"] * deviation, m["shift"], m["scale"])]
    dots = [torch.randn_like(x) for x in low]
    _, y_dot = torch.func.jvp(ada_layer_norm, tuple(low), tuple(dots))
    ref = torch.func.jvp(oracle, tuple(x.double() for x in low), tuple(x.double() for x in dots))[1]
    assert relative_error(y_dot, ref) <= 8e-4  # measured 4e-4


def test_tangents_of_different_rows():
    m = make(4, 3, 8)
    x_dot, scale_dot = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    y = ada_layer_norm(Dual(m["x"], x_dot), m["shift"], Dual(m["scale"], scale_dot))
    padded = torch.cat([x_dot, torch.zeros(2, 3, 8, dtype=torch.float64)])
    padded_scale = torch.cat([scale_dot, torch.zeros(1, 8, dtype=torch.float64)])
    _, ref = torch.func.jvp(lambda x, s: oracle(x, m["shift"], s), (m["x"], m["scale"]), (padded, padded_scale))
    torch.testing.assert_close(y.tangent, ref[:3])


def test_bad_arguments():
    m = make(2, 3, 8)
    with pytest.raises(ValueError, match=r"shift: expected shape \(B, D\) of x = \(2, 8\)"):
        ada_layer_norm(m["x"], m["shift"][:1], m["scale"])
    with pytest.raises(TypeError, match="scale: expected the dtype of x"):
        ada_layer_norm(m["x"], m["shift"], m["scale"].float())
    with pytest.raises(ValueError, match="x: expected 3 dimensions"):
        ada_layer_norm(m["x"][0], m["shift"], m["scale"])
    with pytest.raises(ValueError, match="eps: expected a finite number >= 0"):
        ada_layer_norm(**m, eps=-1.0)
