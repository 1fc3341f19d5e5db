import pytest
import torch
from memory import saved_bytes
from op_checks import DEVICE, forward_ad

from mfkernels import Attention, Dual, attention, use_backend
from mfkernels.testing import assert_dual, dual_errors, relative_error

# measured: 9.0e-16, 4.1e-7, 3.3e-3
BOUNDS = [(torch.float64, 1.8e-15), (torch.float32, 8e-7), (torch.bfloat16, 7e-3)]


def oracle(q, k, v, scale=None, is_causal=False):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = (a.repeat_interleave(group, dim=2) for a in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if is_causal:
        i, j = torch.arange(q.shape[1]), torch.arange(k.shape[1])
        s = torch.where(j[None, :] <= i[:, None], s, -torch.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    return torch.einsum("bhij,bjhd->bihd", p / p.sum(-1, keepdim=True), v)


def packed(B, N, H, d):
    """q, k, v as views of one [B, N, 3, H, d] buffer, as a qkv projection leaves them."""
    return dict(zip("qkv", torch.randn(B, N, 3, H, d, dtype=torch.float64).unbind(2), strict=True))


def separate(B, N_q, N_kv, H, H_kv, d):
    return {
        "q": torch.randn(B, N_q, H, d, dtype=torch.float64),
        "k": torch.randn(B, N_kv, H_kv, d, dtype=torch.float64),
        "v": torch.randn(B, N_kv, H_kv, d, dtype=torch.float64),
    }


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("B", "N", "H", "d"), [(3, 17, 2, 24), (2, 1, 1, 8), (2, 63, 2, 72), (1, 100, 1, 64)])
def test_packed(B, N, H, d, dtype, bound):
    assert_dual(attention, oracle, packed(B, N, H, d), duals="qkv", dtype=dtype, bound=bound)


@pytest.mark.parametrize("duals", ["q", "k", "v", "qk", "kv"])
def test_some_tangents_are_zero(duals):
    assert_dual(
        attention, oracle, packed(3, 17, 2, 24), duals=duals, dtype=torch.float64, bound=1e-15
    )  # measured 4.8e-16


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("N_q", "N_kv"), [(5, 17), (17, 5), (1, 9), (9, 1)])
@pytest.mark.parametrize("H_kv", [1, 2, 4])
def test_cross_grouped_causal(N_q, N_kv, H_kv, is_causal):
    inputs = separate(2, N_q, N_kv, 4, H_kv, 16)
    assert_dual(
        lambda **kw: attention(**kw, scale=0.3, is_causal=is_causal),
        lambda **kw: oracle(**kw, scale=0.3, is_causal=is_causal),
        inputs,
        duals="qkv",
        dtype=torch.float64,
        bound=5e-15,  # measured 2.6e-15: over one key the gradient of q cancels to zero
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_that_is_not_positive(scale, is_causal):
    """PyTorch's fused attention gives NaN with a mask."""
    assert_dual(
        lambda **kw: attention(**kw, scale=scale, is_causal=is_causal),
        lambda **kw: oracle(**kw, scale=scale, is_causal=is_causal),
        separate(2, 19, 17, 4, 2, 16),
        duals="qkv",
        dtype=torch.float64,
        bound=2e-15,
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scale": torch.nan}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": -torch.inf}, ValueError, "scale: expected a finite number, got -inf"),
        ({"scale": 10**400}, ValueError, "scale: expected a finite number"),
        ({"scale": "0.3"}, TypeError, "scale: expected a number, got str"),
        ({"scale": True}, TypeError, "scale: expected a number, got bool"),
        ({"is_causal": "no"}, TypeError, "is_causal: expected True or False, got str"),
        ({"is_causal": None}, TypeError, "is_causal: expected True or False, got NoneType"),
    ],
)
def test_bad_options_are_named(options, error, match):
    x = torch.randn(1, 5, 1, 8)
    with pytest.raises(error, match=match):
        attention(x, x, x, **options)


def test_scores_of_80():
    inputs = packed(2, 33, 2, 16)
    inputs["q"] *= 80 / (inputs["q"].norm(dim=-1, keepdim=True) * inputs["k"].norm(dim=-1).amax() / 4)
    errors = dual_errors(attention, oracle, inputs, duals="qkv", rows=2, dtype=torch.float32)
    assert max(errors.values()) <= 2e-6, errors  # measured 1.0e-6


def test_rows_of_a_dual_and_backward_keep_nothing_of_the_tangent():
    net = Attention(24, 3)
    x = torch.randn(4, 7, 24)
    assert saved_bytes(lambda: net(Dual(x, torch.randn(4, 7, 24)))) == saved_bytes(lambda: net(x)) > 0


@pytest.mark.parametrize("transform", [torch.func.jvp, forward_ad])
def test_forward_mode_ad(transform):
    x = packed(2, 9, 2, 8)
    primals = tuple(a.clone().requires_grad_() for a in x.values())
    tangents = tuple(torch.randn_like(p) for p in primals)
    out, out_dot = transform(attention, primals, tangents)
    ref, ref_dot = torch.func.jvp(oracle, tuple(p.detach() for p in primals), tangents)
    assert relative_error(out, ref) <= 6e-16  # measured 2.8e-16, and at most 3.9e-16 below
    assert relative_error(out_dot, ref_dot) <= 8e-16
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad(out, primals, cotangent)
    theirs = torch.autograd.grad(oracle(*primals), primals, cotangent)
    for g, g_ref in zip(ours, theirs, strict=True):
        assert relative_error(g, g_ref) <= 8e-16


def test_forward_mode_ad_with_one_tangent():
    x = packed(2, 9, 2, 8)
    k_dot = torch.randn_like(x["k"])
    _, out_dot = torch.func.jvp(lambda k: attention(x["q"], k, x["v"]), (x["k"],), (k_dot,))
    _, ref_dot = torch.func.jvp(lambda k: oracle(x["q"], k, x["v"]), (x["k"],), (k_dot,))
    assert relative_error(out_dot, ref_dot) <= 8e-16


def test_empty_batch():
    out = attention(*(Dual(torch.randn(0, 5, 2, 8), torch.randn(0, 5, 2, 8)) for _ in range(3)))
    assert out.primal.shape == out.tangent.shape == (0, 5, 2, 8)


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((2, 5, 4, 8), (2, 5, 3, 8), (2, 5, 3, 8)), "k: expected"),
        (((2, 5, 4, 8), (1, 5, 4, 8), (1, 5, 4, 8)), "k: expected"),
        (((2, 5, 4, 8), (2, 5, 4, 8), (2, 6, 4, 8)), "v: expected the shape of k"),
        (((2, 5, 4, 8), (2, 0, 4, 8), (2, 0, 4, 8)), "k: expected at least one key"),
        (((5, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8)), "q: expected 4 dimensions"),
    ],
)
def test_bad_shapes(shapes, match):
    with pytest.raises(ValueError, match=match):
        attention(*(torch.randn(s) for s in shapes))


def test_bad_dtype():
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(TypeError, match="k: expected the dtype of q"):
        attention(q, q.double(), q)


def test_num_heads_must_divide():
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        Attention(24, 5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_casts_as_it_does_for_pytorchs_attention(backend):
    if backend == "triton":
        pytest.importorskip("triton", minversion="3.4")
    q, k, v = torch.randn(3, 2, 5, 2, 8).to(DEVICE)
    with use_backend(backend), torch.autocast(DEVICE, torch.float16):
        out = attention(Dual(q, q[:1]), k, v.half())
    assert out.primal.dtype == out.tangent.dtype == torch.float16
    exact = attention(Dual(q, q[:1]), k, v)
    assert relative_error(out.primal, exact.primal) <= 6.5e-4  # measured 3.1e-4
    assert relative_error(out.tangent, exact.tangent) <= 6.5e-4
