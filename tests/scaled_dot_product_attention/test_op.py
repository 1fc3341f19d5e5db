"""The drop-in for PyTorch's attention: same arguments, same numbers, and a tangent however one is asked for."""

import oracles
import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mfkernels
from mfkernels import Dual, scaled_dot_product_attention
from mfkernels.testing import assert_dual

CASES = {
    "plain": ((3, 4, 5, 8), (3, 4, 5, 8), {}),
    "cross": ((2, 3, 7, 24), (2, 3, 5, 24), {"scale": 0.3}),
    "causal": ((2, 2, 6, 8), (2, 2, 6, 8), {"is_causal": True}),
    "grouped": ((3, 6, 4, 8), (3, 2, 5, 8), {"enable_gqa": True}),
}


def qkv(case):
    q, k, options = CASES[case]
    return [torch.randn(shape, dtype=torch.float64) for shape in (q, k, k)], options


def oracle(options):
    """Of heads in front of tokens."""
    known = {name: options[name] for name in ("scale", "is_causal") if name in options}

    def attend(query, key, value):
        return oracles.attention(*(x.transpose(1, 2) for x in (query, key, value)), **known).transpose(1, 2)

    return attend


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 8e-16), (torch.float32, 4.1e-7)])  # half is measured
def test_duals(case, dtype, bound):
    (q, k, v), options = qkv(case)
    inputs = {"query": q.mT.contiguous().mT, "key": k, "value": v.transpose(1, 2).contiguous().transpose(1, 2)}
    assert_dual(
        lambda **x: scaled_dot_product_attention(**x, **options),
        oracle(options),
        inputs,
        duals=inputs,
        dtype=dtype,
        bound=bound,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_torch_func_jvp_and_forward_ad(case, compiled):
    primals, options = qkv(case)
    tangents = [torch.randn_like(x) for x in primals]
    expected = torch.func.jvp(oracle(options), tuple(primals), tuple(tangents))

    def jvp(primals, tangents):
        return torch.func.jvp(lambda *x: scaled_dot_product_attention(*x, **options), primals, tangents)

    if compiled:
        torch.compiler.reset()
        jvp = torch.compile(jvp, backend="aot_eager", fullgraph=True)
    for got, ref in zip(jvp(tuple(primals), tuple(tangents)), expected, strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-13, atol=1e-13)  # 2e-15 measured
    with fwAD.dual_level():
        out = scaled_dot_product_attention(*map(fwAD.make_dual, primals, tangents), **options)
        torch.testing.assert_close(fwAD.unpack_dual(out).tangent, expected[1], rtol=1e-13, atol=1e-13)


def test_it_is_pytorchs_in_value_and_gradient():
    primals, _ = qkv("plain")
    for x in primals:
        x.requires_grad_()
    ours = scaled_dot_product_attention(*primals, None, 0.0, True)
    theirs = F.scaled_dot_product_attention(*primals, None, 0.0, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)
    for a, b in zip(torch.autograd.grad(ours.sum(), primals), torch.autograd.grad(theirs.sum(), primals), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)  # the layouts of the sums differ


def layer(x):
    return F.scaled_dot_product_attention(x, x.sin(), x.cos())


@pytest.mark.parametrize("compiled", [False, True])
def test_patch_serves_a_model_that_cannot_be_edited_in_its_block_alone(compiled):
    x, x_dot = (torch.randn(3, 2, 5, 8, dtype=torch.float64) for _ in range(2))

    def jvp():
        return torch.func.jvp(layer, (x,), (x_dot,))[1]

    with sdpa_kernel(SDPBackend.MATH):
        expected = jvp()
    torch.compiler.reset()
    run = torch.compile(jvp, backend="aot_eager", fullgraph=True) if compiled else jvp
    with mfkernels.patch_sdpa():
        torch.testing.assert_close(run(), expected, rtol=1e-13, atol=1e-13)
        with pytest.raises(NotImplementedError, match="attn_mask: expected None"):
            F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5))
    with pytest.raises(NotImplementedError):  # PyTorch's own: no forward mode
        jvp()


def test_patch_in_a_dualized_module():
    x, x_dot = (torch.randn(3, 2, 5, 8, dtype=torch.float64) for _ in range(2))

    class Net(torch.nn.Module):
        def forward(self, x):
            return layer(x)

    net = mfkernels.dualize(Net())
    out = net(Dual(x, x_dot[:2]))
    with mfkernels.patch_sdpa():
        again = net(Dual(x, x_dot[:2]))
    torch.testing.assert_close(again.primal, out.primal, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(again.tangent, out.tangent, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn_mask": torch.ones(5, 5)}, NotImplementedError, "attn_mask: expected None"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: expected 0"),
        ({"query": torch.zeros(3, 5, 8)}, ValueError, "query: expected 4 dimensions"),
        ({"key": torch.zeros(3, 2, 5, 8)}, ValueError, "key: expected the 4 heads of query.*enable_gqa=True"),
        ({"value": torch.zeros(3, 4, 5, 6)}, ValueError, "key, value: expected one shape and the head dim of query, 8"),
        ({"query": 3}, TypeError, "query: expected a tensor or a Dual, got int"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    arguments = {name: torch.zeros(3, 4, 5, 8) for name in ("query", "key", "value")} | change
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**arguments)
