import oracles
import pytest
import torch
from both_backends import DEVICE, both, cases, float32
from memory import saved_bytes
from op_checks import (
    assert_compiles,
    assert_forward_mode,
    assert_no_gradient_through_the_tangent,
    assert_tangents_of_different_rows,
)

from mfkernels import Dual, ada_layer_norm
from mfkernels.ada_layer_norm import op
from mfkernels.testing import relative_error

ALL = ["x", "shift", "scale"]
SIZES = [(4, 7, 24), (3, 17, 48), (2, 276, 48), (2, 1, 2730), (2, 3, 768), (1, 5, 1152)]
SOME = [["x"], ["shift"], ["scale"], ["x", "scale"], ["shift", "scale"]]
backend = both()
case = cases(
    reference=(5e-16, 2.2e-7, 8e-3),  # measured: 2.3e-16, 1.1e-7, 4.1e-3
    triton=(2.6e-7, 4.6e-4, 7.4e-3),  # 1.3e-7, 2.4e-4, 4.1e-3
)
# x + 1e4 leaves 11 bits of the fluctuation in float32: the error is that of the input, both sides see the same one.
# The kernel's mean is itself a float32, 5e-4 from the truth at 1e4.
large_mean = cases(
    reference={torch.float32: 1.2e-3},  # measured 5.7e-4
    triton={torch.float32: 7e-4},  # 4.5e-4, the value's 3.4e-4
)
strided = cases(
    reference=(3.3e-16, 1.6e-7, 5.2e-3),  # measured: 1.7e-16, 7.8e-8, 2.6e-3
    triton=(1.9e-7, 4.6e-4, 8.7e-3),  # 9.3e-8, 2.3e-4, 4.4e-3
)
half = cases(
    reference={torch.float16: 8e-4},  # measured 4.6e-4
    triton={torch.float16: 4.4e-4},  # 2.2e-4
)


def make(B, N, D, mean=0.0):
    shift, scale = torch.randn(B, 6 * D, dtype=torch.float64).chunk(6, dim=1)[1:3]  # strided, as in a DiT block
    return {"x": torch.randn(B, N, D, dtype=torch.float64) + mean, "shift": shift, "scale": scale}


@pytest.mark.parametrize(("size", "duals"), [(s, ALL) for s in SIZES] + [((2, 17, 24), some) for some in SOME])
def test_against_float64(size, duals, case):
    inputs = make(*size)
    case.check(ada_layer_norm, oracles.ada_layer_norm, inputs, duals)


def test_a_large_mean(large_mean):
    inputs = make(4, 7, 48, mean=1e4)
    large_mean.check(ada_layer_norm, oracles.ada_layer_norm, inputs, ALL)


def test_a_constant_row_and_other_strides(strided):
    x = torch.randn(3, 24, 5, dtype=torch.float64).transpose(1, 2)  # [3, 5, 24], not contiguous
    x[0, 1] = 7.0
    shift, scale = torch.randn(2, 24, 3, dtype=torch.float64).transpose(1, 2)  # columns are strided as well
    strided.check(
        lambda **kw: ada_layer_norm(**kw, eps=1e-2),
        lambda **kw: oracles.ada_layer_norm(**kw, eps=1e-2),
        {"x": x, "shift": shift, "scale": scale},
        ALL,
    )


@pytest.mark.parametrize("deviation", [1.0, 0.03, 0.003])
def test_forward_mode_of_half_precision_inputs_that_hardly_vary(deviation, half):
    """PyTorch's own rule of layer_norm cubes rstd in float16, which overflows from 40 on."""
    dtype, bound = half
    m = make(3, 5, 64)
    low = [x.to(DEVICE, dtype) for x in (m["x"] * deviation, m["shift"], m["scale"])]
    dots = [torch.randn_like(x) for x in low]
    _, y_dot = torch.func.jvp(ada_layer_norm, tuple(low), tuple(dots))
    wide, wide_dots = (tuple(x.double() for x in xs) for xs in (low, dots))
    assert relative_error(y_dot, torch.func.jvp(oracles.ada_layer_norm, wide, wide_dots)[1]) <= bound


def test_tangents_of_different_rows(case):
    rows = {"x": 2, "scale": 3}
    assert_tangents_of_different_rows(ada_layer_norm, oracles.ada_layer_norm, make(4, 3, 8), rows, *case)


def test_plain_tensors_and_duals_without_a_tangent(backend):
    m = float32(make(2, 3, 8))
    assert isinstance(ada_layer_norm(**m), torch.Tensor)
    y = ada_layer_norm(Dual(m["x"]), m["shift"], m["scale"])
    assert isinstance(y, Dual)
    assert y.tangent is None


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_samples_or_no_tokens(shape, backend):
    x, m = torch.randn(shape), torch.randn(shape[0], 8)
    leaves = [a.requires_grad_() for a in (x, m, m.clone())]
    out = ada_layer_norm(*(Dual(a, a.detach()) for a in leaves))
    assert out.primal.shape == out.tangent.shape == shape
    grads = torch.autograd.grad(out.primal.sum(), leaves)
    assert all(g.abs().sum() == 0 for g in grads)


def test_bad_arguments(backend):
    m = float32(make(2, 3, 8))
    with pytest.raises(ValueError, match=r"shift: expected shape \(B, D\) of x = \(2, 8\)"):
        ada_layer_norm(m["x"], m["shift"][:1], m["scale"])
    with pytest.raises(TypeError, match="scale: expected the dtype of x"):
        ada_layer_norm(m["x"], m["shift"], m["scale"].double())
    with pytest.raises(ValueError, match="x: expected 3 dimensions"):
        ada_layer_norm(m["x"][0], m["shift"], m["scale"])
    with pytest.raises(ValueError, match="eps: expected a finite number >= 0"):
        ada_layer_norm(**m, eps=-1.0)


# ----------------------------------------------------------------------------------------------- Triton's kernels alone


def test_forward_mode_ad(triton):
    for duals in (ALL, ["scale"]):
        assert_forward_mode(ada_layer_norm, oracles.ada_layer_norm, make(2, 5, 24), duals, bound=5e-7)


def test_a_gradient_through_the_tangent_is_an_error(triton):
    assert_no_gradient_through_the_tangent("ada_layer_norm", ada_layer_norm, float32(make(1, 5, 8)), ALL)


def test_compiles_as_one_graph(triton):
    assert_compiles(ada_layer_norm, [Dual(x, torch.randn_like(x[:2])) for x in float32(make(3, 5, 24)).values()])


def test_backward_keeps_x_scale_and_two_numbers_a_row(triton):
    x, shift, scale = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((4, 7, 24), (4, 24), (4, 24)))
    wanted = 4 * (x.numel() + scale.numel() + 2 * 4 * 7)
    assert saved_bytes(lambda: ada_layer_norm(x, shift, scale)) == wanted
    assert saved_bytes(lambda: ada_layer_norm(*(Dual(a, torch.randn_like(a)) for a in (x, shift, scale)))) == wanted


def test_what_they_do_not_serve_is_refused_by_name(triton):
    with pytest.raises(NotImplementedError, match=r"ada_layer_norm: the triton backend cannot serve.*torch.float64"):
        ada_layer_norm(**{name: a.to(DEVICE) for name, a in make(1, 2, 8).items()})
    wide = torch.zeros(1, 1, 16385, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"x: expected a width from 1 to 16384, got 16385"):
        ada_layer_norm(wide, wide[0], wide[0])


def test_the_operators_obey_pytorchs_rules(triton):
    x, shift, scale = float32(make(2, 5, 12)).values()
    leaves = [a.detach().requires_grad_() for a in (x, shift, scale)]
    dots = [torch.randn_like(a[:1]) for a in (x, shift, scale)]
    for tangents in (dots, [None, None, None], [None, dots[1], None]):
        torch.library.opcheck(op._forward.custom_op, (*leaves, *tangents, 1e-6, torch.float32))
    h, _, stats = op._forward(x, shift, scale, None, None, None, 1e-6, torch.float32)
    torch.library.opcheck(op._backward.custom_op, (torch.randn_like(h), x, scale, stats))
