"""Custom autograd.Functions in a dualized module: without a rule, with one, in place, detaching, leaving PyTorch."""

import warnings

import numpy as np
import pytest
import torch
from dualized import Wrapped, assert_same_jvp
from random_modules import Clip
from torch.utils.checkpoint import checkpoint

from mfkernels import Dual, dualize, jvp

clip = Clip.apply  # as modules keep it


class Scale(torch.autograd.Function):
    """With a forward-mode rule."""

    @staticmethod
    def forward(x):
        return x * 3

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dx):
        return dx * 3

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot * 3


class Round(torch.autograd.Function):
    """A straight-through estimator: its rule is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x.round(), x.sign()

    @staticmethod
    def backward(ctx, dx, _):
        return dx

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot, 0 * x_dot


class Exp(torch.autograd.Function):
    """Without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0]


exp = Exp.apply


def test_a_function_needs_no_rule_and_its_apply_may_have_been_taken_before():
    x, v = torch.randn(2, 6, 4).double()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    net = Wrapped(lambda x: clip(x) * exp(x * weight))
    out, out_dot = jvp(dualize(net), (x,), (v,), rows=3)
    _, expected = torch.func.jvp(lambda x: x.clamp(-1, 1) * (x * weight).exp(), (x,), (v,))
    torch.testing.assert_close(out_dot, expected[:3].detach(), rtol=1e-14, atol=1e-15)
    grads = [torch.autograd.grad(o.square().sum(), weight)[0] for o in (out, net(x))]
    assert torch.equal(*grads)


class Detached(torch.autograd.Function):
    """Its forward detaches, as many do: the tape is off there anyway."""

    @staticmethod
    def forward(ctx, x):
        y = x.detach().exp() + x.data.sin()
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * (x.exp() + x.cos())


class OnNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, dy):
        return dy


def test_a_forward_that_detaches_keeps_its_tangent_and_one_that_leaves_pytorch_is_refused():
    x, v = torch.randn(2, 6, 4).double()
    _, out_dot = jvp(dualize(Wrapped(lambda x: Detached.apply(x) * x.detach())), (x,), (v,), rows=3)
    torch.testing.assert_close(out_dot, ((x.exp() + x.cos()) * x * v)[:3], rtol=1e-14, atol=1e-15)
    net = Wrapped(lambda x: checkpoint(lambda x: x.sin() * x.detach(), x, use_reentrant=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing there requires grad
        _, out_dot = jvp(dualize(net), (x,), (v,), rows=3)
    torch.testing.assert_close(out_dot, (x.cos() * x * v)[:3], rtol=1e-14, atol=1e-15)
    for leaves in (OnNumpy.apply, lambda x: torch.ones(3) * x.data_ptr()):
        with pytest.raises(NotImplementedError, match=r"dualize: (numpy|data_ptr): "):
            dualize(Wrapped(leaves))(Dual(x, v))


def test_a_functions_own_rule_goes_before_its_operators():
    x, v = torch.randn(2, 6, 4).double()
    net = Wrapped(lambda x: Round.apply(3 * x.sin())[0].cos() + Round.apply(x)[0].view(6, 2, 2).flatten(1))
    out, out_dot = jvp(dualize(net), (x,), (v,), rows=3)
    y, y_dot = 3 * x.sin(), 3 * x.cos() * v
    assert torch.equal(out, net(x))
    torch.testing.assert_close(out_dot, (-y.round().sin() * y_dot + v)[:3], rtol=1e-14, atol=1e-15)


class Tripled(torch.autograd.Function):
    """In place, with a rule that is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx, dx):
        return 3 * dx

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot.mul_(5)


def test_a_function_that_writes_in_place_by_its_own_rule():
    def forward(x):
        y = x * 1
        z = y.view(6, 2, 2)
        Tripled.apply(y)
        return y.sin() * z.flatten(1) if last else Tripled.apply(y)

    x, v = torch.randn(2, 6, 4).double()
    for last in (True, False):
        out, out_dot = jvp(dualize(Wrapped(forward)), (x,), (v,), rows=3)
        y, y_dot = 3 * x, 5 * v
        expected = y_dot * (y.sin() + y * y.cos()) if last else 5 * y_dot
        assert torch.equal(out, y.sin() * y if last else 3 * y)
        torch.testing.assert_close(out_dot, expected[:3], rtol=1e-14, atol=1e-15)


def test_a_functions_own_rule_serves_it():
    assert_same_jvp(
        Wrapped(lambda x: Scale.apply(x.sin()).cos()), (torch.randn(5, 3).double(),), (torch.ones(5, 3).double(),)
    )


def test_outputs_of_one_value_and_two_tangents_are_refused():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1, x * 1

        @staticmethod
        def jvp(ctx, x_dot):
            return x_dot, 2 * x_dot

    with pytest.raises(NotImplementedError, match="Twice: its jvp gives outputs of the same values different tangents"):
        dualize(Wrapped(lambda x: Twice.apply(x)[1] + x))(Dual(*torch.randn(2, 6, 4).double()))
