import pytest
import torch
from both_backends import DEVICE, both, cases
from memory import saved_bytes

from mfkernels import adaptive_squared_error
from mfkernels.adaptive_squared_error import op
from mfkernels.testing import relative_error

backend = both()
# of the errors, which are float32 at least, and of the gradient, which the interpreter cuts off twice
case = cases(
    # measured: 1.3e-16, 7.1e-8, 7.2e-8 and 2.1e-16, 1.1e-7, 1.9e-3
    reference=((2.5e-16, 4.2e-16), (1.4e-7, 2.2e-7), (1.5e-7, 3.8e-3)),
    # 3.3e-7 and 3.5e-7, 3.6e-4, 6.6e-3
    triton=((6.6e-7, 7e-7), (6.6e-7, 7.2e-4), (6.6e-7, 1.3e-2)),
)


def oracle(u, v, correction, interval, p, eps):
    rows = len(correction)
    target = torch.cat([v[:rows] - interval[:rows].view(-1, *[1] * (u.ndim - 1)) * correction, v[rows:]]).detach()
    e = ((u - target) ** 2).flatten(1).sum(1)
    return e / (e.detach() + eps) ** p


def make(shape, rows, dtype=torch.float32):
    u, v, correction = torch.randn(3, *shape, dtype=torch.float64).to(DEVICE, dtype)
    interval = torch.rand(shape[0], dtype=torch.float64).to(DEVICE, dtype)
    return u.requires_grad_(), v, correction[:rows], interval


@pytest.mark.parametrize("p", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (3, 3, 20, 20), (2, 513)])
def test_against_float64(shape, p, case):
    dtype, (bound, bound_du) = case
    for rows in (0, 2, shape[0]):
        u, v, correction, interval = make(shape, rows, dtype)
        args = (u, v, correction, interval[: rows if rows % 2 else None])  # of the corrected rows, or of all
        wide = [a.detach().double() for a in args]
        wide[0].requires_grad_()
        out = adaptive_squared_error(*args, p=p, eps=0.01)
        ref = oracle(*wide, p, 0.01)
        assert out.per_sample.dtype == out.squared_error.dtype == torch.promote_types(dtype, torch.float32)
        assert not out.squared_error.requires_grad
        assert relative_error(out.per_sample, ref) <= bound
        assert relative_error(out.squared_error, oracle(*wide, 0.0, 0.01)) <= bound
        cotangent = torch.rand(shape[0], device=DEVICE)
        (g,) = torch.autograd.grad(out.per_sample, args[0], cotangent.to(out.per_sample.dtype))
        (g_ref,) = torch.autograd.grad(ref, wide[0], cotangent.to(out.per_sample.dtype).double())
        assert g.dtype == dtype
        assert relative_error(g, g_ref) <= bound_du


def test_mixed_dtypes_and_strides(backend):
    """Under autocast the prediction is narrower than the velocity; images may be permuted."""
    u, v, correction, interval = make((3, 4, 4, 3), 2)
    u, correction = u.detach().bfloat16(), correction.bfloat16()
    v = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not v.is_contiguous()
    out = adaptive_squared_error(u, v, correction, interval)
    wide = [a.double() for a in (u, v, correction, interval)]
    assert relative_error(out.per_sample, oracle(*wide, 1.0, 0.01)) <= 4e-7


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5)])
def test_no_samples_or_no_elements(shape, backend):
    u, *others = make(shape, shape[0])
    out = adaptive_squared_error(u, *others)
    assert out.per_sample.shape == shape[:1]
    assert out.per_sample.abs().sum() == 0
    (g,) = torch.autograd.grad(out.per_sample.sum(), u)
    assert g.shape == shape


def test_bad_arguments(backend):
    u, a = torch.randn(3, 1, 2, 2), torch.rand(3)
    with pytest.raises(ValueError, match=r"correction: expected shape .* with at most 3 rows"):
        adaptive_squared_error(u, u, torch.randn(4, 1, 2, 2), a)
    with pytest.raises(ValueError, match="correction: expected a tensor without gradient"):
        adaptive_squared_error(u, u, u.clone().requires_grad_(), a)
    with pytest.raises(TypeError, match="correction: expected the dtype of u"):
        adaptive_squared_error(u, u, u.double(), a)
    with pytest.raises(ValueError, match="interval: expected a tensor"):
        adaptive_squared_error(u, u, u)
    with pytest.raises(ValueError, match="correction: expected a tensor"):
        adaptive_squared_error(u, u, interval=a)
    with pytest.raises(ValueError, match=r"interval: expected shape \(3,\) or \(2,\), got \(1,\)"):
        adaptive_squared_error(u, u, u[:2], a[:1])
    with pytest.raises(ValueError, match="v: expected shape"):
        adaptive_squared_error(u, u[:1])
    with pytest.raises(ValueError, match="eps"):
        adaptive_squared_error(u, u, eps=0.0)
    with pytest.raises(ValueError, match="p: expected a finite number >= 0"):
        adaptive_squared_error(u, u, p=-1.0)


# ----------------------------------------------------------------------------------------------- Triton's kernels alone


def test_a_tiny_gradient_survives_half_precision(triton):
    """Divided by a squared error of 5e4 and a batch, 2·error is near float16's smallest number: weighted last."""
    u, *others = make((2, 3, 20, 20), 2, torch.float16)
    u = (8 * u.detach()).requires_grad_()
    wide = [a.detach().double() for a in (u, *others)]
    wide[0].requires_grad_()
    (g,) = torch.autograd.grad(adaptive_squared_error(u, *others).per_sample.sum(), u)
    (g_ref,) = torch.autograd.grad(oracle(*wide, 1.0, 0.01).sum(), wide[0])
    assert relative_error(g, g_ref) <= 1e-3


@pytest.mark.parametrize("rows", [None, 2])
def test_compiles_as_one_graph(rows, triton):
    u, *others = make((3, 2, 5), rows)
    others = others[:1] if rows is None else others
    results = []
    for fn in (
        adaptive_squared_error,
        torch.compile(adaptive_squared_error, fullgraph=True, backend="aot_eager"),
    ):
        out = fn(u, *others, p=1.0)
        results.append((*out, *torch.autograd.grad(out.per_sample.mean(), u)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_backward_keeps_the_error_and_the_weight(triton):
    args = make((3, 2, 5), 3)
    assert saved_bytes(lambda: adaptive_squared_error(*args)) == 4 * (3 * 2 * 5 + 3)
    with torch.no_grad():
        assert saved_bytes(lambda: adaptive_squared_error(*args)) == 0


def test_what_they_do_not_serve_is_refused_by_name(triton):
    u, v, correction, interval = make((3, 2, 5), 2)
    with pytest.raises(NotImplementedError, match=r"u: expected float16, bfloat16 or float32, got torch.float64"):
        adaptive_squared_error(u.double(), v, correction.double(), interval)
    with pytest.raises(NotImplementedError, match=r"interval: expected .* or float32, got torch.float64"):
        adaptive_squared_error(u, v, correction, interval.double())
    with pytest.raises(NotImplementedError, match="v: forward mode through the error is not supported"):
        torch.func.jvp(lambda v: adaptive_squared_error(u, v, correction, interval).per_sample, (v,), (v,))


def test_the_operators_obey_pytorchs_rules(triton):
    u, *others = make((3, 2, 5), 1)
    for rest in (others, [others[0], None, None]):
        for with_error in (True, False):
            leaf = u if with_error else u.detach()
            torch.library.opcheck(op._forward.custom_op, (leaf, *rest, 1.0, 0.01, with_error))
    error, weight = u.detach(), torch.rand(3, device=DEVICE)
    torch.library.opcheck(op._backward.custom_op, (torch.rand(1, device=DEVICE).expand(3), error, weight))
