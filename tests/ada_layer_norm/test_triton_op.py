"""The public function on the Triton backend (in the interpreter where there is no GPU)."""

import pytest
import torch
from memory import saved_bytes
from op_checks import DEVICE, assert_compiles, assert_forward_mode

from mfkernels import Dual, ada_layer_norm, use_backend
from mfkernels.ada_layer_norm import op
from mfkernels.testing import assert_dual, relative_error

pytest.importorskip("triton", minversion="3.4")

# measured in the interpreter: 1.3e-7, 2.3e-4, 3.7e-3 (it cuts bfloat16 off where a GPU rounds)
BOUNDS = [(torch.float32, 2.6e-7), (torch.float16, 4.6e-4), (torch.bfloat16, 7.4e-3)]
ALL = ["x", "shift", "scale"]


@pytest.fixture(autouse=True)
def _triton(poison_empty):
    with use_backend("triton"):
        yield


def oracle(x, shift, scale, eps=1e-6):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * (1 + scale[:, None]) + shift[:, None]


def make(B, N, D, mean=0.0):
    shift, scale = torch.randn(B, 6 * D, dtype=torch.float64).chunk(6, dim=1)[1:3]  # strided, as in a DiT block
    return {"x": torch.randn(B, N, D, dtype=torch.float64) + mean, "shift": shift, "scale": scale}


def duals(B, N, D, rows):
    m = {name: x.float().to(DEVICE) for name, x in make(B, N, D).items()}
    return [Dual(x, torch.randn_like(x[:rows])) for x in m.values()]


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("size", [(4, 17, 24), (2, 276, 48), (2, 1, 2730), (2, 3, 768), (1, 5, 1152)])
def test_against_float64(size, dtype, bound):
    assert_dual(ada_layer_norm, oracle, make(*size), duals=ALL, dtype=dtype, bound=bound, device=DEVICE)


@pytest.mark.parametrize("some", [["x"], ["shift"], ["scale"], ["x", "scale"], ["shift", "scale"]])
def test_some_tangents_are_zero(some):
    inputs = make(2, 17, 24)
    assert_dual(ada_layer_norm, oracle, inputs, duals=some, dtype=torch.float32, bound=2.6e-7, device=DEVICE)


def test_large_mean():
    # the mean itself is float32, 5e-4 from the truth at 1e4; measured 3.4e-4, PyTorch's layer norm 5.7e-4
    inputs = make(4, 7, 48, mean=1e4)
    assert_dual(ada_layer_norm, oracle, inputs, duals=ALL, dtype=torch.float32, bound=7e-4, device=DEVICE)


def test_a_constant_row_and_other_strides():
    x = torch.randn(3, 24, 5, dtype=torch.float64).transpose(1, 2)  # [3, 5, 24], not contiguous
    x[0, 1] = 7.0
    shift, scale = torch.randn(2, 24, 3, dtype=torch.float64).transpose(1, 2)  # columns are strided as well
    inputs = {"x": x, "shift": shift, "scale": scale}

    def with_eps(fn):
        return lambda **kw: fn(**kw, eps=1e-2)

    assert_dual(
        with_eps(ada_layer_norm),
        with_eps(oracle),
        inputs,
        duals=ALL,
        dtype=torch.float32,
        bound=1.9e-7,  # measured 9.3e-8
        device=DEVICE,
    )


def test_tangents_of_different_rows():
    m = {name: x.float().to(DEVICE) for name, x in make(4, 3, 8).items()}
    x_dot, scale_dot = torch.randn(2, 3, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    args = Dual(m["x"], x_dot), m["shift"], Dual(m["scale"], scale_dot)
    y = ada_layer_norm(*args)
    with use_backend("reference"):
        wanted = ada_layer_norm(*args)
    assert y.tangent.shape == wanted.tangent.shape == (3, 3, 8)
    assert relative_error(y.tangent, wanted.tangent) <= 4e-7


def test_plain_tensors_and_duals_without_a_tangent():
    m = {name: x.float().to(DEVICE) for name, x in make(2, 3, 8).items()}
    assert isinstance(ada_layer_norm(**m), torch.Tensor)
    y = ada_layer_norm(Dual(m["x"]), m["shift"], m["scale"])
    assert isinstance(y, Dual)
    assert y.tangent is None


def test_opcheck():
    x, shift, scale = (x.float().to(DEVICE) for x in make(2, 5, 12).values())
    leaves = [a.detach().requires_grad_() for a in (x, shift, scale)]
    dots = [torch.randn_like(a[:1]) for a in (x, shift, scale)]
    for tangents in (dots, [None, None, None], [None, dots[1], None]):
        torch.library.opcheck(op._forward.custom_op, (*leaves, *tangents, 1e-6, torch.float32))
    h, _, stats = op._forward(x, shift, scale, None, None, None, 1e-6, torch.float32)
    torch.library.opcheck(op._backward.custom_op, (torch.randn_like(h), x, scale, stats))


def test_forward_mode_ad():
    assert_forward_mode(ada_layer_norm, oracle, make(2, 5, 24), ALL, bound=5e-7)
    assert_forward_mode(ada_layer_norm, oracle, make(2, 5, 24), ["scale"], bound=5e-7)


def test_a_gradient_through_the_tangent_is_an_error():
    primals = tuple(x.float().to(DEVICE).requires_grad_() for x in make(1, 5, 8).values())
    out, out_dot = torch.func.jvp(ada_layer_norm, primals, tuple(torch.randn_like(p.detach()) for p in primals))
    with pytest.raises(RuntimeError, match="ada_layer_norm: a gradient was asked for through its forward-mode tangent"):
        (out.sum() + out_dot.sum()).backward()


def test_compiles_as_one_graph():
    assert_compiles(ada_layer_norm, duals(3, 5, 24, rows=2))


def test_backward_keeps_x_scale_and_two_numbers_a_row():
    x, shift, scale = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((4, 7, 24), (4, 24), (4, 24)))
    wanted = 4 * (x.numel() + scale.numel() + 2 * 4 * 7)
    h = saved_bytes(lambda: ada_layer_norm(x, shift, scale))
    assert h == wanted
    assert saved_bytes(lambda: ada_layer_norm(*(Dual(a, torch.randn_like(a)) for a in (x, shift, scale)))) == wanted


def test_what_it_does_not_serve_is_refused_by_name():
    m = make(1, 2, 8)
    with pytest.raises(NotImplementedError, match=r"ada_layer_norm: the triton backend cannot serve.*torch.float64"):
        ada_layer_norm(**{name: x.to(DEVICE) for name, x in m.items()})
    wide = torch.zeros(1, 1, 16385, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"x: expected a width from 1 to 16384, got 16385"):
        ada_layer_norm(wide, wide[0], wide[0])


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty(shape):
    x, m = torch.randn(shape, device=DEVICE), torch.randn(shape[0], 8, device=DEVICE)
    leaves = [a.requires_grad_() for a in (x, m, m.clone())]
    out = ada_layer_norm(*(Dual(a, a.detach()) for a in leaves))
    assert out.primal.shape == out.tangent.shape == shape
    grads = torch.autograd.grad(out.primal.sum(), leaves)
    assert all(g.abs().sum() == 0 for g in grads)
