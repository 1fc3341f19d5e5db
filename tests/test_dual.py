import operator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import mfkernels
from mfkernels import Dual, dual_aware, is_dual_aware, jvp, linear_map, split_map
from mfkernels._torch import tree_map
from mfkernels.testing import relative_error


def make(B=4, rows=2, *shape):
    shape = shape or (3,)
    return Dual(torch.randn(B, *shape, dtype=torch.float64), torch.randn(rows, *shape, dtype=torch.float64))


def padded(x):
    return torch.cat([x.tangent, x.primal.new_zeros(len(x.primal) - x.rows, *x.primal.shape[1:])])


BINARY = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(("rows_a", "rows_b"), [(2, 2), (1, 3), (4, 0), (0, 0)])
def test_arithmetic_of_two_duals(name, rows_a, rows_b):
    fn, a, b = BINARY[name], make(4, rows_a), make(4, rows_b)
    out = fn(a, b)
    ref, ref_dot = torch.func.jvp(fn, (a.primal, b.primal), (padded(a), padded(b)))
    rows = max(rows_a, rows_b)
    assert out.rows == rows
    assert torch.equal(out.primal, ref)
    assert relative_error(out.tangent, ref_dot[:rows]) <= 3e-16


# 1/Dual is not linear: there is no such op
CASES = [(name, swap) for name in (*BINARY, "divide") for swap in (False, True) if (name, swap) != ("divide", True)]


@pytest.mark.parametrize(("name", "swap"), CASES)
@pytest.mark.parametrize("other", [2.5, "row", "batch", "broadcast"])
def test_arithmetic_with_numbers_and_tensors(name, swap, other):
    fn = BINARY.get(name, lambda a, b: a / b)
    x = make()
    shape = {"row": (3,), "batch": (4, 3), "broadcast": (1, 3)}
    b = torch.randn(shape[other], dtype=torch.float64) if isinstance(other, str) else other
    run = (lambda a: fn(b, a)) if swap else (lambda a: fn(a, b))
    out = run(x)
    ref, ref_dot = torch.func.jvp(run, (x.primal,), (padded(x),))
    assert torch.equal(out.primal, ref)
    assert relative_error(out.tangent, ref_dot[:2]) <= 3e-16


def test_arithmetic_with_a_zero_tangent():
    x, y = Dual(torch.randn(3, 2)), Dual(torch.randn(3, 2), torch.randn(2, 2))
    assert (x + 1).tangent is None
    assert torch.equal((x - y).tangent, -y.tangent)
    assert torch.equal((-y).tangent, -y.tangent)


def test_dividing_by_a_dual_is_refused():
    with pytest.raises(TypeError, match="other: a Dual can be divided by"):
        make() / make()


def test_a_dual_is_a_pytree_node():
    x = make()
    assert isinstance(tree_map(lambda a: a * 2, x), Dual)
    assert (x.shape, x.dtype, x.device.type, x.rows) == ((4, 3), torch.float64, "cpu", 2)


def test_linear_and_split_map():
    x = make(4, 2, 6)
    a, b = split_map(lambda p: p.chunk(2, dim=1), x)
    assert torch.equal(b.tangent, x.tangent[:, 3:])
    assert torch.equal(linear_map(lambda p: p.flip(1), a).tangent, x.tangent[:, :3].flip(1))
    assert split_map(lambda p: p.chunk(2, dim=1), x.primal)[0].shape == (4, 3)
    assert split_map(lambda p: p.chunk(2, dim=1), Dual(x.primal))[0].tangent is None


# ----------------------------------------------------------------------------------------------------------------- jvp


class Net(nn.Module):
    """Not dual-aware; mixes its inputs, takes a label by keyword and returns what `kind` says."""

    num_classes = 3

    def __init__(self, kind="tensor"):
        super().__init__()
        self.kind = kind
        self.w = nn.Linear(5, 5).double()
        self.label = nn.Embedding(4, 5).double()

    def forward(self, z, t, *, y=None):
        u = torch.tanh(self.w(z) * t[:, None])
        u = u if y is None else u + self.label(y) * z
        return {"tensor": u, "tuple": (u, {"v": u * t[:, None]})}[self.kind]


@dual_aware
class DualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = mfkernels.Mlp(5, 9).double()
        self.calls = 0

    def forward(self, z, t, y=None):
        self.calls += 1
        u = self.mlp(z) * linear_map(lambda a: a[:, None], t)
        return {"u": u, "aux": (mfkernels.linear_map(lambda a: a, z).primal * 2,)}


def inputs(B=4):
    return torch.randn(B, 5, dtype=torch.float64), torch.rand(B, dtype=torch.float64)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, None])
def test_fallback_equals_func_jvp(rows):
    net, (z, t), (dz, dt), y = Net("tuple"), inputs(), inputs(), torch.tensor([0, 1, 2, 1])
    out, out_dot = jvp(net, (z, t), (dz, dt), rows=rows, y=y)
    ref, ref_dot = torch.func.jvp(lambda z, t: net(z, t, y=y), (z, t), (dz, dt))
    R = 4 if rows is None else rows
    assert torch.equal(out[0], ref[0])
    assert relative_error(out_dot[0], ref_dot[0][:R]) <= 1.2e-16  # measured 6e-17
    assert relative_error(out_dot[1]["v"], ref_dot[1]["v"][:R]) <= 1.2e-16
    assert out[0].requires_grad
    assert not out_dot[0].requires_grad


def test_fallback_with_a_zero_tangent_and_short_tangents():
    net, (z, t), (dz, _) = Net(), inputs(), inputs()
    _, out_dot = jvp(net, (z, t), (dz[:2], None))
    _, ref_dot = torch.func.jvp(lambda z: net(z, t), (z,), (dz,))
    assert relative_error(out_dot, ref_dot[:2]) <= 1e-15


def test_dual_aware_runs_once_and_keeps_structure():
    net, (z, t), (dz, dt) = DualNet(), inputs(), inputs()
    out, out_dot = jvp(net, (z, t), (dz, dt), rows=3)
    assert net.calls == 1
    assert out_dot["aux"] == (None,)
    _, ref_dot = torch.func.jvp(lambda z, t: net.mlp(z) * t[:, None], (z, t), (dz, dt))
    assert relative_error(out_dot["u"], ref_dot[:3]) <= 1e-15
    assert out["aux"][0].shape == (4, 5)


def test_an_output_that_ignores_the_tangent_is_zero():
    _, out_dot = jvp(dual_aware(lambda z, t: Dual(t.primal)), inputs(), inputs(), rows=2)
    assert torch.equal(out_dot, torch.zeros(2, dtype=torch.float64))


def test_dual_awareness_is_seen_through_wrappers():
    net = DualNet()
    assert is_dual_aware(net)
    assert is_dual_aware(torch.compile(net, backend="eager"))
    assert not is_dual_aware(Net())
    assert not is_dual_aware(lambda z: z)


def test_gradient_flows_through_the_primal_alone():
    net, (z, t), (dz, dt) = DualNet(), inputs(), inputs()
    out, out_dot = jvp(net, (z, t), (dz, dt))
    with pytest.raises(RuntimeError, match="does not require grad"):
        out_dot["u"].sum().backward()
    out["u"].sum().backward()
    assert net.mlp.fc1.weight.grad.abs().sum() > 0


class Lambda(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


def test_sdpa_without_a_rule_names_the_op_and_the_cure():
    def sdpa(x):
        return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 3, 7, 8)
    cure = r"scaled_dot_product\w*attention.*mfkernels.scaled_dot_product_attention .*patch_sdpa.*mfkernels.dualize"
    with pytest.raises(NotImplementedError, match=cure) as refusal:
        jvp(sdpa, (x,), (x,))
    assert "mfkernels.attention" not in str(refusal.value)  # of another layout, and in silence

    def drop_in(x):
        return mfkernels.scaled_dot_product_attention(x, x, x)

    _, out_dot = jvp(drop_in, (x,), (x,))
    with mfkernels.patch_sdpa():
        torch.testing.assert_close(jvp(sdpa, (x,), (x,))[1], out_dot)
    torch.testing.assert_close(jvp(mfkernels.dualize(Lambda(sdpa)), (x,), (x,))[1], out_dot)


def test_a_custom_function_without_a_rule_is_refused():
    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match="has no forward-mode"):
        jvp(Square.apply, (x,), (x,))


def test_a_custom_op_never_gives_a_silent_zero():
    @torch.library.custom_op("mfkernels_test::flash_attn_like", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match=r"flash_attn_like.*mfkernels.attention, of \(B, N, H, d\)"):
        jvp(lambda x: op(x) + x, (x,), (x,))
    # an op that the tangent does not reach is none of our business
    _, out_dot = jvp(lambda x: op(torch.ones(2, 3)) + x, (x,), (x,))
    assert torch.equal(out_dot, x)


@pytest.mark.parametrize("settings", [{}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_batch_statistics_are_refused(settings):
    """The first rows alone have other statistics than the batch: their tangent would be that of another function."""
    x = torch.randn(6, 5)
    norm = nn.BatchNorm1d(5, **settings)
    with pytest.raises(NotImplementedError, match=r"fn: .* mixes batch rows .*use eval\(\) or another norm"):
        jvp(norm, (x,), (x,), rows=2)
    with pytest.raises(NotImplementedError, match="fn: batch_norm mixes batch rows"):
        jvp(lambda x: nn.functional.batch_norm(x, None, None, None, None, True), (x,), (x,), rows=2)
    if settings.get("track_running_stats", True):
        norm.eval()
        _, out_dot = jvp(norm, (x,), (x,), rows=2)
        torch.testing.assert_close(out_dot, (norm(x) - norm(0 * x))[:2])


def test_other_errors_of_the_callable_pass_through():
    def broken(x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        jvp(broken, (torch.randn(2),), (torch.randn(2),))


Z, T = torch.randn(4, 5), torch.rand(4)


@pytest.mark.parametrize(
    ("primals", "tangents", "rows", "error", "match"),
    [
        (Z, (Z,), None, TypeError, "primals: expected a non-empty tuple"),
        ((), (), None, TypeError, "primals: expected a non-empty tuple"),
        ((Z,), Z, None, TypeError, "tangents: expected a tuple"),
        ((Z, T), (Z,), None, ValueError, r"tangents: expected one per primal \(2\), got 1"),
        ((Z, T[:3]), (Z, T), None, ValueError, r"primals\[1\]: expected a batch"),
        ((Z, T), (Z, torch.rand(5)), None, ValueError, r"tangents\[1\]: expected at most 4 rows"),
        ((Z, T), (Z.double(), T), None, TypeError, r"tangents\[0\]: expected the primal's dtype"),
        ((Z, T), (Z[:, :2], T), None, ValueError, r"tangents\[0\]: expected shape"),
        ((Z, T), (Z.clone().requires_grad_(), T), None, ValueError, r"tangents\[0\]: a tangent must not require grad"),
        ((Z, T), (Z, T), 5, ValueError, r"rows: expected a number in \[0, 4\]"),
        ((Z, T), (Z[:1], T), 2, ValueError, r"tangents\[0\]: expected at least 2 rows"),
        ((Z, T), (None, None), None, ValueError, "every tangent is None"),
        ((Z, "t"), (Z, None), None, TypeError, r"primals\[1\]: expected a tensor"),
        ((Z, torch.arange(4)), (Z, torch.arange(4)), None, TypeError, r"tangents\[1\]: a torch.int64 primal"),
    ],
)
def test_bad_arguments(primals, tangents, rows, error, match):
    with pytest.raises(error, match=match):
        jvp(lambda z, t: z, primals, tangents, rows=rows)


def test_broadcasting_that_would_move_rows_is_refused():
    one, four, row = make(1, 1), torch.randn(4, 3, dtype=torch.float64), Dual(torch.randn(3), torch.randn(3))
    for call in (lambda: one / four, lambda: one * four, lambda: one + four, lambda: make() - one, lambda: row * four):
        with pytest.raises(ValueError, match="other: expected an operand that leaves the rows of a Dual"):
            call()


def test_a_named_tuple_comes_back_as_one():
    class Out(NamedTuple):
        u: object
        aux: object

    out, out_dot = jvp(dual_aware(lambda z: Out(z * 2, None)), (torch.randn(3, 2),), (torch.ones(3, 2),))
    assert isinstance(out, Out)
    assert torch.equal(out_dot.u, torch.full((3, 2), 2.0))


def test_fallback_outputs_that_are_no_tensors_have_no_tangent():
    x = torch.randn(3, 2)
    out, out_dot = jvp(lambda x: {"u": x * 2, "n": 7, "none": None}, (x,), (torch.ones(3, 2),), rows=2)
    assert out["n"] == 7
    assert out_dot["n"] is None
    assert out_dot["none"] is None
    assert torch.equal(out_dot["u"], torch.full((2, 2), 2.0))


def test_forward_mode_is_never_dropped_in_silence():
    x = torch.randn(3)
    with pytest.raises(NotImplementedError, match="a second derivative"):
        torch.func.jvp(lambda x: jvp(torch.sin, (x,), (torch.ones(3),))[1], (x,), (x,))
    z = torch.randn(2, 5, 1, 8)
    with pytest.raises(NotImplementedError, match="cannot be mixed"):
        torch.func.jvp(lambda k: mfkernels.attention(Dual(z, z), k, z).primal, (z,), (z,))


def test_weights_of_another_dtype_or_device_are_named():
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):
        mfkernels.linear(x, w.double())
    with pytest.raises(ValueError, match="weight: expected the device of x"):
        mfkernels.linear(x, w.to("meta"))
    with pytest.raises(TypeError, match="b1: expected the dtype of x"):
        mfkernels.mlp(x, w, torch.zeros(4).double(), w.T, None)
    with pytest.raises(ValueError, match=r"x: expected \(B, …, D\), got shape \(3,\)"):
        mfkernels.mlp(x[0], w, None, w.T, None)
    u = torch.randn(2, 1, 2, 2)
    with pytest.raises(ValueError, match="v: expected the device of u"):
        mfkernels.adaptive_squared_error(u, u.to("meta"))
    with pytest.raises(TypeError, match="u: expected a tensor, got a Dual"):
        mfkernels.adaptive_squared_error(Dual(u, u), u)
    with pytest.raises(TypeError, match="rows: expected an integer"):
        jvp(torch.sin, (x,), (x,), rows=1.0)


def test_a_dual_pass_runs_on_meta_tensors():
    net = mfkernels.Attention(8, 2).to("meta")
    out = net(Dual(torch.empty(2, 3, 8, device="meta"), torch.empty(1, 3, 8, device="meta")))
    assert out.tangent.shape == (1, 3, 8)
    with pytest.raises(TypeError, match="weight: expected the dtype of x"):  # "meta" knows no autocast to ask about
        mfkernels.linear(torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta", dtype=torch.float16))


# ------------------------------------------------------------------------------------------------------ what is no Dual


@pytest.mark.parametrize("array", [np.arange(3.0), np.float32(2), np.float64(2), np.arange(12.0).reshape(4, 3)])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
def test_numpy_arrays_make_no_arrays_of_duals(name, array):
    d = Dual(torch.randn(4, 3), torch.randn(2, 3))
    op = getattr(operator, name)
    if np.ndim(array) == 0:
        assert isinstance(op(d, array), Dual)
        if name != "truediv":
            assert isinstance(op(array, d), Dual)
        return
    with pytest.raises(TypeError, match="other: expected a Dual, a tensor or a number, got ndarray"):
        op(d, array)
    with pytest.raises(TypeError):
        op(array, d)


@pytest.mark.parametrize(
    ("tangent", "error", "match"),
    [
        (torch.randn(5, 3), ValueError, "tangent: expected at most 4 rows"),
        (torch.randn(2, 4), ValueError, r"tangent: expected shape \(rows, 3\)"),
        (torch.randn(2, 3).double(), TypeError, "tangent: expected the primal's dtype"),
        (torch.randn(3), ValueError, "tangent: expected shape"),
        ([1.0], TypeError, "tangent: expected a tensor, got list"),
        (torch.randn(2, 3).to_sparse(), TypeError, r"tangent: expected a dense \(strided\) tensor"),
        (torch.randn(2, 3, requires_grad=True), ValueError, "tangent: a tangent must not require grad"),
    ],
)
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_arithmetic_with_tangents_that_do_not_fit(name, tangent, error, match):
    good, bad = Dual(torch.randn(4, 3), torch.randn(2, 3)), Dual(torch.randn(4, 3), tangent)
    with pytest.raises(error, match=f"other.{match}"):
        getattr(operator, name)(good, bad)
    with pytest.raises(error, match=f"self.{match}"):
        getattr(operator, name)(bad, good)
    with pytest.raises(error, match=f"self.{match}"):
        getattr(operator, name)(bad, 2.0)
    with pytest.raises(error, match=f"self.{match}"):
        operator.truediv(bad, 2.0)


# ------------------------------------------------------------------------------------------- outputs of jvp's fallback


@pytest.mark.parametrize("rows", [0, 1, 2, 4])
def test_an_output_that_is_squeezed(rows):
    x, dx = torch.randn(4, 1, 3), torch.randn(4, 1, 3)
    out, out_dot = jvp(lambda x: x.sin().squeeze(), (x,), (dx,), rows=rows)
    assert out.shape == (4, 3)
    torch.testing.assert_close(out_dot, (x.cos() * dx)[:rows, 0])


@pytest.mark.parametrize("B", [0, 1, 4])
def test_no_rows(B):
    """A function that fails on an empty batch is not asked for one that it was not given."""
    x = torch.randn(B, 3)
    fn = (lambda x: x * 2) if B == 0 else (lambda x: {"y": x / x.amax(), "n": 3})
    _, out_dot = jvp(fn, (x,), (torch.ones(B, 3),), rows=0)
    if B == 0:
        assert out_dot.shape == (0, 3)
    else:
        assert out_dot["y"].shape == (0, 3)
        assert out_dot["n"] is None


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.mean(),
        lambda x: x.mean(0, keepdim=True),
        lambda x: x.T,
        lambda x: torch.cat([x, x]),
        lambda x: list(x),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_an_output_without_the_batch_is_refused(fn, rows):
    x, dx = torch.randn(4, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match="fn: expected"):
        jvp(fn, (x,), (dx,), rows=rows)
    _, out_dot = jvp(fn, (x,), (dx,))
    torch.testing.assert_close(out_dot, torch.func.jvp(lambda x: fn(x), (x,), (dx,))[1])
