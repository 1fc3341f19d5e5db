"""The public function on the Triton backend (in the interpreter where there is no GPU)."""

import pytest
import torch
from memory import saved_bytes
from op_checks import DEVICE

from mfkernels import meanflow_loss, use_backend
from mfkernels.meanflow_loss import op
from mfkernels.testing import relative_error

pytest.importorskip("triton", minversion="3.4")


@pytest.fixture(autouse=True)
def _triton(poison_empty):
    with use_backend("triton"):
        yield


def oracle(u, du, v, t, r, p, eps):
    du = torch.cat([du, torch.zeros_like(u[len(du) :])])
    target = (v - (t - r).view(-1, *[1] * (u.ndim - 1)) * du).detach()
    e = ((u - target) ** 2).flatten(1).sum(1)
    return e / (e.detach() + eps) ** p


def make(shape, rows, dtype=torch.float32):
    u, du, v = torch.randn(3, *shape, dtype=torch.float64).to(DEVICE, dtype)
    t, r = torch.rand(2, shape[0], dtype=torch.float64).to(DEVICE)
    r = r * t
    return u.requires_grad_(), du[:rows], v, t.to(dtype), r.to(dtype)


# measured in the interpreter: loss 3.3e-7 (p = 0.75); gradient 3.5e-7, 3.6e-4, 6.6e-3 (it cuts bfloat16 off, twice)
@pytest.mark.parametrize(
    ("dtype", "bound", "bound_du"),
    [(torch.float32, 6.6e-7, 7e-7), (torch.float16, 6.6e-7, 7.2e-4), (torch.bfloat16, 6.6e-7, 1.3e-2)],
)
@pytest.mark.parametrize("p", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (3, 3, 20, 20), (2, 513)])
def test_against_float64(shape, p, dtype, bound, bound_du):
    for rows in (0, 2, shape[0]):
        args = make(shape, rows, dtype)
        wide = [a.detach().double() for a in args]
        wide[0].requires_grad_()
        out = meanflow_loss(*args, norm_p=p, norm_eps=0.01)
        ref = oracle(*wide, p, 0.01)
        assert out.per_sample.dtype == out.squared_error.dtype == torch.float32
        assert not out.squared_error.requires_grad
        assert relative_error(out.per_sample, ref) <= bound
        assert relative_error(out.squared_error, oracle(*wide, 0.0, 0.01)) <= bound
        cotangent = torch.rand(shape[0], device=DEVICE)
        (g,) = torch.autograd.grad(out.per_sample, args[0], cotangent)
        (g_ref,) = torch.autograd.grad(ref, wide[0], cotangent.double())
        assert g.dtype == dtype
        assert relative_error(g, g_ref) <= bound_du


def test_mixed_dtypes_and_strides():
    """Under autocast the prediction is narrower than the velocity; images may be permuted."""
    u, du, v, t, r = make((3, 4, 4, 3), 2)
    u, du, v = u.detach().bfloat16(), du.bfloat16(), v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not v.is_contiguous()
    out = meanflow_loss(u, du, v, t, r)
    wide = [a.double() for a in (u, du, v, t, r)]
    assert relative_error(out.per_sample, oracle(*wide, 1.0, 0.01)) <= 4e-7


def test_a_tiny_gradient_survives_half_precision():
    """Divided by a squared error of 5e4 and a batch, 2(u − u_tgt) is near float16's smallest number: weighted last."""
    u, du, v, t, r = make((2, 3, 20, 20), 2, torch.float16)
    u = (8 * u.detach()).requires_grad_()
    wide = [a.detach().double() for a in (u, du, v, t, r)]
    wide[0].requires_grad_()
    (g,) = torch.autograd.grad(meanflow_loss(u, du, v, t, r).per_sample.sum(), u)
    (g_ref,) = torch.autograd.grad(oracle(*wide, 1.0, 0.01).sum(), wide[0])
    assert relative_error(g, g_ref) <= 1e-3


def test_opcheck():
    args = make((3, 2, 5), 1)
    for du_dt in (args[1], args[1][:0]):
        for with_error in (True, False):
            leaves = args if with_error else [args[0].detach(), *args[1:]]
            torch.library.opcheck(op._forward.custom_op, (leaves[0], du_dt, *leaves[2:], 1.0, 0.01, with_error))
    error, weight = args[0].detach(), torch.rand(3, device=DEVICE)
    torch.library.opcheck(op._backward.custom_op, (torch.rand(1, device=DEVICE).expand(3), error, weight))


def test_compiles_as_one_graph():
    u, *others = make((3, 2, 5), 2)
    results = []
    for fn in (meanflow_loss, torch.compile(meanflow_loss, fullgraph=True, backend="aot_eager")):
        out = fn(u, *others, norm_p=1.0)
        results.append((*out, *torch.autograd.grad(out.per_sample.mean(), u)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_backward_keeps_the_error_and_the_weight():
    args = make((3, 2, 5), 3)
    assert saved_bytes(lambda: meanflow_loss(*args)) == 4 * (3 * 2 * 5 + 3)
    with torch.no_grad():
        assert saved_bytes(lambda: meanflow_loss(*args)) == 0


def test_what_it_does_not_serve_is_refused_by_name():
    u, du, v, t, r = make((3, 2, 5), 2)
    with pytest.raises(NotImplementedError, match=r"u: expected float16, bfloat16 or float32, got torch.float64"):
        meanflow_loss(u.double(), du.double(), v, t, r)
    with pytest.raises(NotImplementedError, match=r"t: expected float16, bfloat16 or float32, got torch.float64"):
        meanflow_loss(u, du, v, t.double(), r)
    with pytest.raises(NotImplementedError, match="v: forward mode through the loss is not supported"):
        torch.func.jvp(lambda v: meanflow_loss(u, du, v, t, r).per_sample, (v,), (v,))


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5)])
def test_empty(shape):
    u, *others = make(shape, shape[0])
    out = meanflow_loss(u, *others)
    assert out.per_sample.shape == shape[:1]
    assert out.per_sample.abs().sum() == 0
    (g,) = torch.autograd.grad(out.per_sample.sum(), u)
    assert g.shape == shape
