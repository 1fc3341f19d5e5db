"""The public functions on the Triton backend (in the interpreter where there is no GPU)."""

import pytest
import torch
from memory import saved_bytes
from op_checks import DEVICE, assert_compiles, assert_forward_mode

from mfkernels import Dual, gated_residual, gated_residual_ada_layer_norm, use_backend
from mfkernels.gated_residual import op
from mfkernels.testing import assert_dual, relative_error

pytest.importorskip("triton", minversion="3.4")

# measured in the interpreter: alone 1.1e-7, 2.2e-4, 3.5e-3; with the norm 1.5e-7, 3.2e-4, 3.8e-3 (it cuts bfloat16 off
# where a GPU rounds)
BOUNDS = [(torch.float32, 2.2e-7), (torch.float16, 4.4e-4), (torch.bfloat16, 7e-3)]
BOUNDS_NORM = [(torch.float32, 3e-7), (torch.float16, 6.4e-4), (torch.bfloat16, 7.6e-3)]
SIZES = [(4, 17, 24), (2, 276, 48), (2, 1, 2730), (1, 5, 1152)]
RESIDUAL, MODULATION = ["x", "y", "gate"], ["shift", "scale"]


@pytest.fixture(autouse=True)
def _triton(poison_empty):
    with use_backend("triton"):
        yield


def oracle(x, y, gate):
    return x + gate[:, None] * y


def oracle_norm(x, y, gate, shift, scale):
    x = oracle(x, y, gate)
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-6) * (1 + scale[:, None]) + shift[:, None]


def oracle_both(**kw):
    """What a block reads of the fused op: the stream and its norm, as one tensor."""
    return torch.cat([oracle(kw["x"], kw["y"], kw["gate"]), oracle_norm(**kw)], dim=1)


def both(**kw):
    x, h = gated_residual_ada_layer_norm(**kw)
    if not isinstance(x, Dual):
        return torch.cat([x, h], dim=1)
    return Dual(torch.cat([x.primal, h.primal], dim=1), torch.cat([x.tangent, h.tangent], dim=1))


def make(B, N, D):
    gate, shift, scale = torch.randn(B, 6 * D, dtype=torch.float64).chunk(6, dim=1)[2:5]  # strided, as in a DiT block
    x, y = torch.randn(2, B, N, D, dtype=torch.float64)
    return {"x": x, "y": y, "gate": gate}, {"shift": shift, "scale": scale}


def duals(B, N, D, rows):
    residual, modulation = make(B, N, D)
    low = [x.float().to(DEVICE) for x in (*residual.values(), *modulation.values())]
    return [Dual(x, torch.randn_like(x[:rows])) for x in low]


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("size", SIZES)
def test_alone(size, dtype, bound):
    inputs = make(*size)[0]
    assert_dual(gated_residual, oracle, inputs, duals=RESIDUAL, dtype=dtype, bound=bound, device=DEVICE)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS_NORM)
@pytest.mark.parametrize("size", SIZES)
def test_stream_and_norm(size, dtype, bound):
    residual, modulation = make(*size)
    inputs = {**residual, **modulation}
    assert_dual(both, oracle_both, inputs, duals=inputs, dtype=dtype, bound=bound, device=DEVICE)


@pytest.mark.parametrize("some", [["x"], ["y"], ["gate"], ["x", "gate"], ["y", "gate"]])
def test_some_tangents_are_zero(some):
    residual, modulation = make(2, 17, 24)
    assert_dual(gated_residual, oracle, residual, duals=some, dtype=torch.float32, bound=2.2e-7, device=DEVICE)
    inputs = {**residual, **modulation}
    for more in ([], ["shift"]):
        assert_dual(both, oracle_both, inputs, duals=[*some, *more], dtype=torch.float32, bound=3e-7, device=DEVICE)


def test_one_of_the_two_results_unused():
    """The gradient of the other is then absent, not zero."""
    residual, modulation = make(2, 7, 24)
    constants = {name: x.float().to(DEVICE) for name, x in modulation.items()}
    options = {"duals": RESIDUAL, "dtype": torch.float32, "bound": 3e-7, "device": DEVICE}

    def stream(**kw):
        return gated_residual_ada_layer_norm(**kw, **constants)[0]

    def norm(**kw):
        return gated_residual_ada_layer_norm(**kw)[1]

    assert_dual(stream, oracle, residual, **options)
    assert_dual(norm, oracle_norm, {**residual, **modulation}, **options)


def test_each_result_has_the_tangent_of_what_it_depends_on():
    x, y, gate, shift, scale = duals(3, 5, 8, rows=2)
    for args in ((x.primal, y.primal, gate.primal, shift, scale), (x, y.primal, Dual(gate.primal), shift, scale)):
        x_new, h = gated_residual_ada_layer_norm(*args)
        with use_backend("reference"):
            wanted = gated_residual_ada_layer_norm(*args)
        assert type(x_new) is type(wanted[0])
        assert relative_error(h.tangent, wanted[1].tangent) <= 3e-7
    shift = Dual(shift.primal, torch.randn(3, 8, device=DEVICE))
    x_new, h = gated_residual_ada_layer_norm(x, y, gate, shift, scale)
    assert (x_new.rows, h.rows) == (2, 3)


def leaves_of(duals):
    return [d.primal.detach().requires_grad_() for d in duals], [d.tangent for d in duals]


def test_opcheck():
    leaves, dots = leaves_of(duals(2, 5, 12, rows=1))
    vector = torch.randn(12, device=DEVICE, requires_grad=True)
    for tangents in (dots, [None] * 5, [None, dots[1], None, None, dots[4]]):
        torch.library.opcheck(op._forward.custom_op, (*leaves[:3], *tangents[:3]))
        for bias, base, defer in ((None, None, False), (vector, None, True), (vector, leaves[:3], False)):
            before = [None] * 4 if base is None else [*base[:2], base[2], vector]
            args = (*leaves, *tangents, bias, 1e-6, torch.float32, True, *before, defer)
            # where the sum is not written, what is returned in its place is NaN, which is not equal to itself
            checks = {"test_utils": ("test_schema", "test_faketensor")} if defer else {}
            torch.library.opcheck(op._norm_forward.custom_op, args, **checks)
    x, y, gate, _, scale = (a.detach() for a in leaves)
    x_new, h, _, _, stats = op._norm_forward(*leaves, *[None] * 6, 1e-6, torch.float32, True)
    torch.library.opcheck(op._backward.custom_op, (torch.randn_like(x), y, gate))
    for dx_new, bias in ((torch.randn_like(x), None), (None, vector.detach())):
        args = (torch.randn_like(h), dx_new, x_new.detach(), y, gate, bias, scale, stats, bias is not None)
        torch.library.opcheck(op._norm_backward.custom_op, args)


def test_forward_mode_ad():
    residual, modulation = make(2, 5, 24)
    assert_forward_mode(gated_residual, oracle, residual, RESIDUAL, bound=3e-7)
    assert_forward_mode(both, oracle_both, {**residual, **modulation}, [*RESIDUAL, "scale"], bound=8e-7)


def test_a_gradient_through_the_tangent_is_an_error():
    leaves, dots = leaves_of(duals(2, 5, 8, rows=2))
    (_, h), (_, h_dot) = torch.func.jvp(gated_residual_ada_layer_norm, tuple(leaves), tuple(dots))
    with pytest.raises(RuntimeError, match="gated_residual_ada_layer_norm: a gradient was asked for through its"):
        (h.sum() + h_dot.sum()).backward()


def test_compile_as_one_graph():
    args = duals(3, 5, 24, rows=2)
    assert_compiles(gated_residual, args[:3])
    assert_compiles(gated_residual_ada_layer_norm, args)


def test_backward_keeps_nothing_of_the_tangent():
    args = duals(4, 7, 24, rows=4)
    leaves, _ = leaves_of(args)
    with_tangents = [Dual(p, d.tangent) for p, d in zip(leaves, args, strict=True)]
    stream, vector = 4 * leaves[0].numel(), leaves[2].untyped_storage().nbytes()
    alone = saved_bytes(lambda: gated_residual(*leaves[:3]))
    assert alone == stream + vector  # y and gate
    assert saved_bytes(lambda: gated_residual(*with_tangents[:3])) == alone
    fused = saved_bytes(lambda: gated_residual_ada_layer_norm(*leaves))
    assert fused == 2 * stream + 2 * vector + 8 * 4 * 7  # x_new and y, gate and scale, mean and rstd of each row
    assert saved_bytes(lambda: gated_residual_ada_layer_norm(*with_tangents)) == fused


def test_what_they_do_not_serve_is_refused_by_name():
    residual, modulation = make(1, 2, 8)
    inputs = {name: x.to(DEVICE) for name, x in {**residual, **modulation}.items()}
    with pytest.raises(NotImplementedError, match=r"gated_residual: the triton backend cannot serve.*torch.float64"):
        gated_residual(**{name: inputs[name] for name in RESIDUAL})
    with pytest.raises(NotImplementedError, match=r"gated_residual_ada_layer_norm: the triton backend cannot serve"):
        gated_residual_ada_layer_norm(**inputs)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty(shape):
    x, m = torch.randn(shape, device=DEVICE), torch.randn(shape[0], 8, device=DEVICE)
    leaves = [a.clone().requires_grad_() for a in (x, x, m, m, m)]
    args = [Dual(a, a.detach()) for a in leaves]
    outs = (gated_residual(*args[:3]), *gated_residual_ada_layer_norm(*args))
    assert all(out.primal.shape == out.tangent.shape == shape for out in outs)
    grads = torch.autograd.grad(sum(out.primal.sum() for out in outs), leaves)
    assert all(g.abs().sum() == 0 for g in grads)


def test_mixed_dtypes_under_autocast():
    """The residual stream stays float32, what linears give is bfloat16; results and gradients as the reference's."""
    x, y, gate, shift, scale = duals(3, 5, 24, rows=2)
    low = [Dual(d.primal.bfloat16(), d.tangent.bfloat16()) for d in (y, gate, shift, scale)]
    results = []
    for backend in ("triton", "reference"):
        leaves = [d.primal.detach().requires_grad_() for d in (x, *low)]
        args = [Dual(p, d.tangent) for p, d in zip(leaves, (x, *low), strict=True)]
        with use_backend(backend), torch.autocast(DEVICE, dtype=torch.bfloat16):
            out = gated_residual(*args[:3])
            x_new, h = gated_residual_ada_layer_norm(*args)
        grads = torch.autograd.grad((out.primal + x_new.primal + h.primal).float().square().sum(), leaves)
        results.append([a for o in (out, x_new, h) for a in o] + list(grads))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= 1e-2  # measured 5.2e-3: the interpreter cuts bfloat16 off
