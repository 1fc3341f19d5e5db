"""The module's projection and attention as one op: dqkv in one buffer, the bias's gradient summed by the kernels."""

import oracles
import pytest
import torch
from both_backends import DEVICE, both, cases
from torch.utils.flop_counter import FlopCounterMode

from mfkernels import Attention, Dual, Linear, requested_backend, use_backend
from mfkernels.attention import projected
from mfkernels.attention.projected import projected_attention
from mfkernels.testing import relative_error

# reference, then Triton; twice what was measured. The interpreter gets products of bfloat16 wrong
case = cases(reference=(3.8e-15, 2e-6, 2e-2), triton=(1.7e-6, 2.2e-3, 2e-2))
backend = both()


def oracle(x, weight, bias=None, num_heads=2):
    qkv = x @ weight.T if bias is None else x @ weight.T + bias
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return oracles.attention(q, k, v).flatten(2)


def make(B, N, D, bias=True):
    inputs = {"x": torch.randn(B, N, D, dtype=torch.float64)}
    inputs["weight"] = torch.randn(3 * D, D, dtype=torch.float64) * D**-0.5
    return inputs | ({"bias": torch.randn(3 * D, dtype=torch.float64)} if bias else {})


def op(x, weight, bias=None):
    return projected_attention(x, weight, bias, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(3, 17, 48), (2, 1, 16), (1, 67, 144), (4, 130, 16)])
def test_value_tangent_and_gradients(size, bias, case):
    if DEVICE == "cpu" and case.dtype == torch.bfloat16 and requested_backend() == "triton":
        pytest.skip("the interpreter gets products of bfloat16 wrong")
    case.check(op, oracle, make(*size, bias), ["x"])


def test_autocast_keeps_the_gradients_of_float32_weights(backend):
    """In float16, with float32 weights: as exact as autocast's own, and not rounded where the product is not."""
    inputs = {name: a.float().to(DEVICE).requires_grad_() for name, a in make(3, 33, 48).items()}
    wide = {name: a.detach().double().requires_grad_() for name, a in inputs.items()}
    x_dot = torch.randn(2, 33, 48)
    with torch.autocast(DEVICE, dtype=torch.float16):
        o = op(Dual(inputs["x"], x_dot), inputs["weight"], inputs["bias"])
    assert o.primal.dtype == o.tangent.dtype == torch.float16
    ref = oracle(**wide)
    assert relative_error(o.primal, ref) <= 2e-3
    weight = torch.randn(ref.shape)
    grads = torch.autograd.grad(o.primal, list(inputs.values()), weight.half())
    wanted = torch.autograd.grad(ref, list(wide.values()), weight.half().double())
    for name, g, g_ref in zip(inputs, grads, wanted, strict=True):
        assert g.dtype == torch.float32
        assert relative_error(g, g_ref) <= 3e-3, name


def test_another_backward_stacks_its_gradients():
    pytest.importorskip("triton", minversion="3.4")
    inputs = {name: a.float().to(DEVICE).requires_grad_() for name, a in make(2, 9, 32).items()}
    grads = {}
    for asked in ("triton", "triton,attention_backward=flash"):
        with use_backend(asked):
            o = op(**inputs)
        grads[asked] = torch.autograd.grad(o.square().sum(), list(inputs.values()))
    for ours, theirs in zip(*grads.values(), strict=True):
        assert relative_error(theirs, ours) <= 2e-6


def test_opcheck():
    pytest.importorskip("triton", minversion="3.4")
    x, weight, bias = (a.float().to(DEVICE).requires_grad_() for a in make(2, 5, 16).values())
    for x_dot in (torch.randn(1, 5, 16, device=DEVICE), None):
        for b in (bias, None):
            args = (x, x_dot, weight, b, 2, 0.35, torch.float32, "triton", "triton")
            torch.library.opcheck(projected._forward.custom_op, args)
    o, _, qkv, lse, *_ = projected._forward(x, None, weight, bias, 2, 0.35, torch.float32, "triton", "triton")
    saved = [a.detach() for a in (torch.randn_like(o), x, weight, qkv, o, lse)]
    torch.library.opcheck(projected._backward.custom_op, (*saved, 0.35, torch.float32, True, "triton"))


def test_opcheck_where_operands_are_cast_and_not_contiguous():
    pytest.importorskip("triton", minversion="3.4")
    x, weight, bias = (a.float().to(DEVICE) for a in make(2, 16, 16).values())
    x, weight = x.mT.contiguous().mT.requires_grad_(), weight.mT.contiguous().mT.requires_grad_()
    args = (x, None, weight, bias, 2, 0.35, torch.float16, "triton", "triton")
    torch.library.opcheck(projected._forward.custom_op, args)


def test_a_compiler_takes_patches_as_they_come():
    """Whose last two dimensions are exchanged, under autocast."""
    pytest.importorskip("triton", minversion="3.4")
    x = torch.randn(2, 32, 16, device=DEVICE).mT.requires_grad_()
    net = Attention(32, 2).to(DEVICE)
    outs = {}
    for name, fn in (("eager", net), ("compiled", torch.compile(net, fullgraph=True))):
        with use_backend("triton"), torch.autocast(DEVICE, dtype=torch.float16):
            out = fn(x)
        outs[name] = [out, *torch.autograd.grad(out.float().square().sum(), [x, *net.parameters()])]
    for ours, theirs in zip(*outs.values(), strict=True):
        assert relative_error(theirs, ours) <= 2e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_a_counter_of_flops_sees_the_projection(backend, autocast):
    x = torch.randn(2, 9, 32, requires_grad=True)
    net = Attention(32, 2)
    with torch.autocast(DEVICE, dtype=torch.float16, enabled=autocast), FlopCounterMode(display=False) as counter:
        net.qkv(x).sum().backward()
        alone = counter.get_total_flops()
    with torch.autocast(DEVICE, dtype=torch.float16, enabled=autocast), FlopCounterMode(display=False) as counter:
        projected_attention(x, net.qkv.weight, net.qkv.bias, 2).sum().backward()
    assert counter.get_total_flops() >= alone == 3 * 2 * 2 * 9 * 32 * 96


def test_what_was_put_in_place_of_a_projection_is_called(backend):
    class Doubled(Linear):
        def forward(self, x):
            return super().forward(x) * 2.0

    torch.manual_seed(0)
    net = Attention(32, 2)
    x = torch.randn(2, 5, 32)
    plain = net(x)
    doubled = Doubled(32, 96)
    doubled.load_state_dict(net.qkv.state_dict())
    net.qkv = doubled
    with torch.no_grad():
        scaled = Attention(32, 2)
        scaled.load_state_dict(net.state_dict())
        scaled.qkv.weight *= 2
        scaled.qkv.bias *= 2
    assert not torch.allclose(net(x), plain)
    assert relative_error(net(x), scaled(x)) <= 2e-6


def test_empty(backend):
    net = Attention(16, 2)
    for shape in ((0, 5, 16), (2, 0, 16)):
        if shape[1] == 0:
            with pytest.raises(ValueError, match="at least one key"):
                net(torch.randn(shape))
            continue
        x = torch.randn(shape, requires_grad=True)
        out = net(Dual(x, torch.randn(shape)))
        assert out.primal.shape == out.tangent.shape == shape
        grads = torch.autograd.grad(out.primal.sum(), [x, *net.parameters()])
        assert all(g.abs().sum() == 0 for g in grads)


def test_bad_arguments_each_time(backend):
    net = Attention(16, 2)
    net(torch.randn(2, 3, 16))
    for _ in range(2):
        with pytest.raises(ValueError, match="x: expected last size 16"):
            net(torch.randn(2, 3, 24))
