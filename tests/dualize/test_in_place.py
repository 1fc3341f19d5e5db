"""Writes in place within a dual pass: into inputs, buffers and what the tape holds, and changes of shape."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dualized import Wrapped, assert_same_jvp, duals
from minimum import needs_compile_of_a_pass
from torch import nn

from mfkernels import Dual, dualize, jvp


@pytest.mark.parametrize("dualized", [False, True])
@pytest.mark.parametrize("net", [nn.Sequential(nn.SiLU(inplace=True)), Wrapped(lambda z: z.mul_(2)[:, :1].sin_() + z)])
def test_what_a_module_writes_into_its_input_is_not_the_callers(net, dualized):
    z, v = torch.randn(2, 5, 3).double()
    before = z.clone(), v.clone()
    value, expected = torch.func.jvp(net, (z.clone(),), (v.clone(),))
    out, out_dot = jvp(dualize(net) if dualized else net, (z,), (v,), rows=3)
    assert torch.equal(z, before[0])
    assert torch.equal(v, before[1])
    assert torch.equal(out, value)
    torch.testing.assert_close(out_dot, expected[:3], rtol=1e-14, atol=1e-15)


def test_operators_whose_out_of_place_overload_has_another_name_or_none():
    x, v = torch.rand(2, 6, 4).double() + 0.5
    assert_same_jvp(Wrapped(lambda x: torch.complex(x, x).pow_(2).imag + (x * 1).ldexp_(torch.tensor(2))), (x,), (v,))
    with pytest.raises(NotImplementedError, match="polygamma: it writes in place, and there is no out-of-place"):
        dualize(Wrapped(lambda x: (x * 1).polygamma_(1)))(Dual(x, v))


@pytest.mark.parametrize("dualized", [False, True])
def test_expanded_inputs(dualized):
    z, v = (a.expand(5, 3, 4) for a in torch.randn(2, 3, 4).double())
    net = Wrapped(lambda z: z.cosh() + torch.special.i0(z) + torch.hypot(z, 2 * z))
    out, out_dot = jvp(dualize(net) if dualized else net, (z,), (v,), rows=3)
    _, expected = torch.func.jvp(net, (z.contiguous(),), (v.contiguous(),))
    assert torch.equal(out, net(z))
    torch.testing.assert_close(out_dot, expected[:3], rtol=1e-14, atol=1e-15)


def test_a_write_over_what_the_tape_holds_is_told_as_pytorch_tells_it():
    def forward(x, after):
        y = (x * weight).exp()  # saved
        if not after:
            y.view(-1).mul_(2)
        return y

    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (x,) = duals((6, 4))
    for after in (False, True):
        u = dualize(Wrapped(lambda x, after=after: forward(x, after)))(x).primal
        if after:
            u.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            u.sum().backward()


def test_a_write_over_an_output_that_others_were_made_of():
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    net = Wrapped(lambda x: (lambda h: (h * weight, h))(x.sin()))  # h needs no gradient, the product saved it
    (x,) = duals((6, 4))
    y, h = dualize(net)(x)
    h.primal.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.primal.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_tape_does_not_hold_an_expanded_inputs_memory(requires_grad):
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    base = torch.randn(1, 4, dtype=torch.float64, requires_grad=requires_grad)
    x = base.expand(6, 4)
    out = jvp(dualize(Wrapped(lambda x: (x * weight).sin())), (x,), (torch.randn(6, 4).double(),), rows=2)[0]
    expected = torch.autograd.grad((x * weight).sin().sum(), [weight, base][: 1 + requires_grad])
    with torch.no_grad():
        base.mul_(0)
    grads = torch.autograd.grad(out.sum(), [weight, base][: 1 + requires_grad])
    for grad, ref in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, ref, rtol=1e-13, atol=1e-14)


def test_a_write_into_a_plain_tensor_in_inference_mode():
    eye = torch.eye(4, dtype=torch.float64)
    net = Wrapped(lambda x: F.linear(torch.zeros_like(x).copy_(x), eye).softmax(1) + x)
    (x,) = duals((6, 4))
    with torch.no_grad():
        expected = dualize(net)(x).tangent
    with torch.inference_mode():
        assert torch.equal(dualize(net)(x).tangent, expected)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compile_of_a_pass)])
def test_a_shape_changed_in_place(compiled):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.kept = nn.Linear(3, 5).double(), nn.Linear(4, 2).double(), []

        def forward(self, x):  # [B, 4, 3]
            y = 2 * self.first(x)
            y.transpose_(1, 2).mul_(x.mean((1, 2), keepdim=True))
            if not compiled:
                self.kept = [y * 1]
            return self.last(y.sin())

    net, (x, v) = Turned(), torch.randn(2, 6, 4, 3).double()
    dual = dualize(net)

    def step(x, v):
        return jvp(dual, (x,), (v,), rows=2)

    torch._dynamo.reset()
    run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
    out, out_dot = run(x, v)
    expected, expected_dot = torch.func.jvp(net, (x,), (v,))
    torch.testing.assert_close(out_dot, expected_dot[:2], rtol=1e-13, atol=1e-14)
    weight = net.first.weight
    grads = [torch.autograd.grad(o.square().sum(), weight)[0] for o in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-14)
    for kept in dual.kept:  # its primal now, and still a tensor of one shape
        with torch.no_grad():
            assert kept.unsqueeze_(0).shape == (kept + 0).shape == (1, 6, 5, 4)


@pytest.mark.parametrize("which", [0, 1])
def test_the_shape_of_a_view_is_not_changed_in_place(which):
    # its gradient would be that of the view as it was, which for a square may pass unnoticed
    def turned(x):
        y = x * 1
        both = y, y[:, :]
        return both[which].transpose_(1, 2) * 2

    net, x = dualize(Wrapped(turned)), Dual(torch.randn(6, 3, 3), torch.randn(6, 3, 3))
    with pytest.raises(NotImplementedError, match="it changes in place the shape of a tensor that is a view"):
        net(x)
    with torch.no_grad():
        assert torch.equal(net(x).tangent, 2 * x.tangent.mT)


def test_a_plain_tensors_shape_changed_in_place_after_a_write():
    def turned(x):
        y = torch.ones(6, 3, 4, dtype=x.dtype)
        y.mul_(x.mT).transpose_(1, 2)
        return y.sin()

    x, v = torch.randn(2, 6, 4, 3).double()
    _, out_dot = jvp(dualize(Wrapped(turned)), (x,), (v,), rows=2)
    torch.testing.assert_close(out_dot, (v * x.cos())[:2], rtol=1e-13, atol=1e-14)


def test_a_strided_input_written_to_by_sample():
    def write(x):
        x[torch.arange(4), torch.tensor([0, 1, 0, 1])] = 2 * x[:, 0]  # at no prefix of the rows
        return x * 1

    x, v = torch.randn(2, 4, 2, 8).double()[..., ::2]  # no memory after the last element
    x, v = x.flatten().new_empty_strided(x.shape, x.stride()).copy_(x), v.contiguous()
    _, out_dot = jvp(dualize(Wrapped(write)), (x,), (v,))
    _, expected = torch.func.jvp(write, (x.clone(),), (v.clone(),))
    assert torch.equal(out_dot, expected)


def test_detaching_in_place_and_setting_data():
    x, v = torch.randn(2, 6, 4).double()
    _, out_dot = jvp(dualize(Wrapped(lambda x: (x * 1).detach_() * x)), (x,), (v,))
    torch.testing.assert_close(out_dot, x * v)

    def replace(x):
        y = x * 2
        y.data = 3 * x
        return y

    with pytest.raises(NotImplementedError, match=r"x\.data = y"):
        dualize(Wrapped(replace))(Dual(x, v))


def test_an_exception_leaves_no_tangent_in_a_buffer():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(6, 4, dtype=torch.float64))

        def forward(self, x):
            self.seen = x * 2
            raise KeyError("their own")

    net = dualize(Failing())
    (x,) = duals((6, 4))
    with pytest.raises(KeyError):
        net(x)
    assert type(net.seen) is torch.Tensor
    assert torch.equal(net.seen, 2 * x.primal)


def test_what_is_written_into_a_buffer_stays_there_without_its_tangent():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(5, 3, dtype=torch.float64))

        def forward(self, x):
            self.cache[: x.shape[0]] = x
            return 2 * self.cache[: x.shape[0]]

    net, (x,) = dualize(Cached()), duals((5, 3))
    assert net(x).tangent is not None
    assert type(net.cache) is torch.Tensor
    torch.testing.assert_close(net.cache, x.primal)
    copy.deepcopy(net)
