"""Plain tensors under torch.func.jvp and forward_ad: one meaning for every op, on both backends."""

from typing import NamedTuple

import pytest
import torch
from both_backends import DEVICE, DTYPES
from op_checks import forward_ad

import mfkernels
from mfkernels import Dual
from mfkernels.check.case import cases_by_op


@pytest.fixture(params=DTYPES)
def backend(request):
    """Each backend in turn; without a default device, which the compiler does not take everywhere."""
    if request.param == "triton":
        pytest.importorskip("triton", minversion="3.4")
    with mfkernels.use_backend(request.param):
        yield request.param


SIZES = {
    "attention": (2, 5, 2, 8),
    "mlp": (2, 3, 8, 12),
    "rotary": (2, 3, 2, 1, 8),
    "qk_norm_rotary": (2, 3, 2, 1, 8),
    "timestep_embedding": (3, 8),
}
OTHERS = {  # names of tangents, shapes of all
    "linear": ("x", {"x": (2, 3), "weight": (4, 3), "bias": (4,)}),
    "patch_embed": ("x", {"x": (2, 1, 4, 4), "weight": (3, 1, 2, 2)}),
    "silu": ("x", {"x": (2, 3)}),
    "scaled_dot_product_attention": ("query key value", dict.fromkeys(("query", "key", "value"), (2, 2, 5, 8))),
}
OPS = sorted({*cases_by_op(), *OTHERS} - {"adaptive_squared_error"})
CONSTANT = "a gradient was asked for through its forward-mode tangent"


class Case(NamedTuple):
    run: object  # of the primals that carry tangents
    primals: tuple
    tangents: tuple


def case_of(op):
    if op in OTHERS:
        names, shapes = OTHERS[op]
        duals, fn = names.split(), getattr(mfkernels, op)
        inputs = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    else:
        case = cases_by_op()[op].make(*SIZES.get(op, (2, 3, 8)))
        duals, fn = case.duals, case.on(DEVICE, case.ours)
        inputs = {name: x.to(DEVICE, torch.float32) for name, x in case.inputs().items()}
    primals = tuple(inputs[name].clone().requires_grad_() for name in duals)
    return Case(
        lambda *xs: fn(**{**inputs, **dict(zip(duals, xs, strict=True))}),
        primals,
        tuple(torch.randn_like(x) for x in primals),
    )


def jvp(fn, primals, tangents):
    return torch.func.jvp(fn, tuple(primals), tuple(tangents))


@pytest.mark.parametrize("transform", [jvp, forward_ad])
@pytest.mark.parametrize("op", OPS)
def test_the_tangent_is_a_constant(backend, op, transform):
    case = case_of(op)
    plain = case.run(*case.primals)
    expected = torch.autograd.grad(plain.square().sum(), case.primals)
    out, out_dot = transform(case.run, case.primals, case.tangents)
    for g, ref in zip(torch.autograd.grad(out.square().sum(), case.primals), expected, strict=True):
        torch.testing.assert_close(g, ref)

    out, out_dot = transform(case.run, case.primals, case.tangents)
    with pytest.raises(RuntimeError, match=CONSTANT):
        torch.autograd.grad(out_dot.sum(), case.primals)
    with pytest.raises(RuntimeError, match=CONSTANT):
        torch.autograd.grad((out + out_dot).sum(), case.primals)
    with torch.no_grad():
        again = transform(case.run, case.primals, case.tangents)[1]
    torch.testing.assert_close(again, out_dot.detach())


@pytest.mark.parametrize("transform", [jvp, forward_ad])
@pytest.mark.parametrize("op", OPS)
def test_the_tangent_is_a_constant_when_compiled(backend, op, transform):
    case = case_of(op)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(*primals):
        return transform(case.run, primals, case.tangents)

    out, out_dot = run(*case.primals)
    expected = torch.autograd.grad(case.run(*case.primals).sum(), case.primals)
    for g, ref in zip(torch.autograd.grad(out.sum(), case.primals), expected, strict=True):
        torch.testing.assert_close(g, ref)
    out, out_dot = run(*case.primals)
    with pytest.raises(RuntimeError, match=CONSTANT):
        torch.autograd.grad((out + out_dot).sum(), case.primals)


@pytest.mark.parametrize("op", OPS)
def test_under_torch_func_grad(backend, op):
    case = case_of(op)
    primals = tuple(x.detach() for x in case.primals)

    def part(i):
        return torch.func.grad(lambda *xs: jvp(case.run, xs, case.tangents)[i].sum())(*primals)

    if backend == "triton" and op not in ("linear", "patch_embed", "silu"):
        with pytest.raises(NotImplementedError, match=r"mfkernels.\w+: torch.func.grad and its kin"):
            part(0)
        return
    torch.testing.assert_close(part(0), torch.func.grad(lambda *xs: case.run(*xs).sum())(*primals))
    with pytest.raises(RuntimeError, match=CONSTANT):
        part(1)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's, of addcmul_
@pytest.mark.parametrize("op", [op for op in OPS if "attention" not in op])  # whose formula vmap does not take
def test_under_vmap(op):
    """Several tangents of the same primals at once, as torch.func.jacfwd takes them."""
    case = case_of(op)
    several = [torch.stack([a, 2 * a]) for a in case.tangents]

    def tangents(*primals):
        return torch.func.vmap(lambda *dots: jvp(case.run, primals, dots)[1])(*several)

    with mfkernels.use_backend("reference"):
        expected = jvp(case.run, case.primals, case.tangents)[1].detach()
        found = tangents(*case.primals)
        torch.testing.assert_close(found.detach(), torch.stack([expected, 2 * expected]))
        with pytest.raises(RuntimeError, match=CONSTANT):
            torch.autograd.grad(found.sum(), case.primals)
        with pytest.raises(NotImplementedError, match="constants by design"):
            torch.func.grad(lambda *xs: tangents(*xs).sum())(*(x.detach() for x in case.primals))


def test_of_a_single_number(backend):
    one = torch.ones((), device=DEVICE)
    y, y_dot = jvp(mfkernels.silu, (one,), (one,))
    torch.testing.assert_close(y, one.sigmoid())
    torch.testing.assert_close(y_dot, one.sigmoid() * (2 - one.sigmoid()))


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused(backend, op):
    """It would be zero, or that of a part of the tangent's terms."""
    case = case_of(op)
    primals = tuple(x.detach() for x in case.primals)
    with pytest.raises(NotImplementedError, match="the derivative of a forward-mode tangent"):
        jvp(lambda *xs: jvp(case.run, xs, case.tangents)[1], primals, case.tangents)
    with pytest.raises(NotImplementedError, match="the derivative of a forward-mode tangent"):
        jvp(lambda *dots: jvp(case.run, primals, dots)[1], case.tangents, case.tangents)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_and_duals_are_not_mixed(backend, op):
    case = case_of(op)

    def run(x):
        return case.run(Dual(x, case.tangents[0]), *case.primals[1:]).primal

    with pytest.raises(NotImplementedError, match="cannot be mixed"):
        jvp(run, case.primals[:1], case.tangents[:1])


def test_parameters_of_a_linear_map_carry_tangents(backend):
    x, weight, bias = (torch.randn(shape, device=DEVICE) for shape in ((5, 3), (4, 3), (4,)))
    dots = torch.randn_like(weight), torch.randn_like(bias)
    _, y_dot = jvp(lambda w, b: mfkernels.linear(x, w, b), (weight, bias), dots)
    torch.testing.assert_close(y_dot, x @ dots[0].mT + dots[1])


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
def test_parameters_of_an_mlp_do_not(backend, name):
    shapes = {"w1": (6, 4), "b1": (6,), "w2": (3, 6), "b2": (3,)}
    inputs = {key: torch.randn(shape, device=DEVICE) for key, shape in shapes.items()}
    x = torch.randn(2, 5, 4, device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"{name}: a forward-mode tangent of a parameter"):
        jvp(lambda p: mfkernels.mlp(x, **{**inputs, name: p}), (inputs[name],), (torch.randn_like(inputs[name]),))


@pytest.mark.parametrize("name", ["u", "v", "correction", "interval"])
def test_forward_mode_through_the_error_is_refused(backend, name):
    shapes = {"u": (2, 3), "v": (2, 3), "correction": (2, 3), "interval": (2,)}
    inputs = {key: torch.rand(shape, device=DEVICE) for key, shape in shapes.items()}
    with pytest.raises(NotImplementedError, match=f"{name}: forward mode through the error is not supported"):
        jvp(
            lambda x: mfkernels.adaptive_squared_error(**{**inputs, name: x}).per_sample,
            (inputs[name],),
            (torch.randn_like(inputs[name]),),
        )
