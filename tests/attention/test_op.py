"""The public function; the kernels themselves are in test_kernels.py and test_cuda_kernels.py."""

import oracles
import pytest
import torch
from attention_cases import assert_block_compiles, packed, separate
from both_backends import DEVICE, both, cases
from memory import saved_bytes
from op_checks import assert_forward_mode, assert_no_gradient_through_the_tangent

from meanflow.models import DiT
from meanflow.objectives import MeanFlow
from mfkernels import Attention, Dual, attention, use_backend
from mfkernels.attention import op
from mfkernels.testing import relative_error

backend = both()
# the interpreter gets products of bfloat16 wrong; on a GPU not yet measured
ON_A_GPU = {torch.bfloat16: 1.2e-2} if DEVICE == "cuda" else {}
case = cases(
    reference=(1.8e-15, 8e-7, 7e-3),  # measured: 9.0e-16, 4.1e-7, 3.3e-3
    triton={torch.float32: 1.05e-6, torch.float16: 6.5e-4, **ON_A_GPU},  # 5.3e-7, 3.3e-4
)
some_zero = cases(
    reference={torch.float64: 7.5e-16},  # measured 3.7e-16
    triton={torch.float32: 5e-7},  # 2.2e-7
)
cross = cases(
    reference={torch.float64: 1.2e-15},  # measured 5.8e-16
    triton={torch.float32: 6e-7},  # 3.1e-7
)
few = cases(reference={torch.float64: 8.8e-15})  # measured 4.4e-15: over one key the gradient of q cancels to zero
not_positive = cases(
    reference={torch.float64: 1.1e-15},  # measured 5.4e-16
    triton={torch.float32: 6e-7},  # 3.1e-7
)
scores_of_80 = cases(
    reference={torch.float32: 2e-6},  # measured 1.0e-6
    triton={torch.float32: 3.5e-6},  # 1.7e-6
)
# of the value and its tangent, and of gradients
forward_mode = cases(
    # measured: 3.6e-16 and 4.6e-16, 1.4e-7 and 2.0e-7
    reference={torch.float64: (6e-16, 8e-16), torch.float32: (5e-7, 1e-6)},
    triton={torch.float32: (5e-7, 1e-6)},  # 1.2e-7 and 2.8e-7
)


def bind(**options):
    """The op and its oracle with the same options."""
    return lambda **kw: attention(**kw, **options), lambda **kw: oracles.attention(**kw, **options)


@pytest.mark.parametrize(("B", "N", "H", "d"), [(3, 17, 2, 24), (2, 1, 1, 8), (2, 63, 1, 72), (1, 100, 1, 64)])
def test_packed(B, N, H, d, case):
    case.check(attention, oracles.attention, packed(B, N, H, d), "qkv")


@pytest.mark.parametrize("duals", ["q", "k", "v", "qk", "kv"])
def test_some_tangents_are_zero(duals, some_zero):
    inputs = packed(2, 17, 1, 16)
    some_zero.check(attention, oracles.attention, inputs, duals)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("H_kv", [1, 2])
def test_cross_grouped_causal(H_kv, is_causal, cross):
    run, oracle = bind(scale=0.3, is_causal=is_causal)
    cross.check(run, oracle, separate(2, 19, 17, 2, H_kv, 16), "qkv")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("N_q", "N_kv"), [(5, 17), (17, 5), (1, 9), (9, 1)])
@pytest.mark.parametrize("H_kv", [1, 2, 4])
def test_few_queries_or_keys(N_q, N_kv, H_kv, is_causal, few):
    """By the reference alone: the interpreter takes seconds each, and test_kernels.py has such sizes."""
    run, oracle = bind(scale=0.3, is_causal=is_causal)
    few.check(run, oracle, separate(2, N_q, N_kv, 4, H_kv, 16), "qkv")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_that_is_not_positive(scale, is_causal, not_positive):
    """PyTorch's fused attention gives NaN with a mask."""
    run, oracle = bind(scale=scale, is_causal=is_causal)
    inputs = separate(2, 19, 17, 2, 1, 16)
    not_positive.check(run, oracle, inputs, "qkv")


def test_scores_of_80(scores_of_80):
    inputs = packed(2, 33, 2, 16)
    inputs["q"] *= 80 / (inputs["q"].norm(dim=-1, keepdim=True) * inputs["k"].norm(dim=-1).amax() / 4)
    scores_of_80.check(attention, oracles.attention, inputs, "qkv")


def test_forward_mode_ad(forward_mode):
    dtype, (bound, gradient_bound) = forward_mode
    inputs = packed(2, 9, 2, 8)
    assert_forward_mode(attention, oracles.attention, inputs, "qkv", bound, gradient_bound, dtype)


def test_forward_mode_ad_with_one_tangent(forward_mode):
    dtype, (bound, _) = forward_mode
    q, k, v = (x.to(DEVICE, dtype) for x in packed(2, 9, 2, 8).values())
    k_dot = torch.randn_like(k)
    _, out_dot = torch.func.jvp(lambda k: attention(q, k, v), (k,), (k_dot,))
    wide = [x.double() for x in (q, v)]
    _, ref_dot = torch.func.jvp(lambda k: oracles.attention(wide[0], k, wide[1]), (k.double(),), (k_dot.double(),))
    assert relative_error(out_dot, ref_dot) <= bound


def test_a_gradient_through_the_tangent_is_an_error(backend):
    inputs = {name: torch.randn(1, 5, 1, 8) for name in "qkv"}
    assert_no_gradient_through_the_tangent("attention", attention, inputs, "qkv")


def test_backward_keeps_nothing_of_the_tangent(backend):
    net, x = Attention(24, 3), torch.randn(4, 7, 24)
    assert saved_bytes(lambda: net(Dual(x, torch.randn_like(x)))) == saved_bytes(lambda: net(x)) > 0


def test_autocast_casts_as_it_does_for_pytorchs_attention(backend):
    q, k, v = torch.randn(3, 2, 5, 2, 8)
    with torch.autocast(DEVICE, torch.float16):
        out = attention(Dual(q, q[:1]), k, v.half())
    assert out.primal.dtype == out.tangent.dtype == torch.float16
    with use_backend("reference"):
        exact = attention(Dual(q, q[:1]), k, v)
    assert relative_error(out.primal, exact.primal) <= 6.5e-4  # measured 3.1e-4
    assert relative_error(out.tangent, exact.tangent) <= 6.5e-4


def test_empty_batch(backend):
    out = attention(*(Dual(a, a) for a in torch.randn(3, 0, 5, 2, 8)))
    assert out.primal.shape == out.tangent.shape == (0, 5, 2, 8)


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
def test_bad_options_are_named(options, error, match, backend):
    x = torch.randn(1, 5, 1, 8)
    with pytest.raises(error, match=match):
        attention(x, x, x, **options)


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
def test_bad_shapes(shapes, match, backend):
    with pytest.raises(ValueError, match=match):
        attention(*(torch.randn(s) for s in shapes))


def test_bad_dtype(backend):
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(TypeError, match="k: expected the dtype of q"):
        attention(q, q.double(), q)


def test_num_heads_must_divide():
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        Attention(24, 5)


# ----------------------------------------------------------------------------------------------- Triton's kernels alone


def test_a_block_compiles_as_one_graph_and_gradients_reach_qkv(triton):
    assert_block_compiles(32, 2, std=0.2, bound=5e-7)


def test_training_steps_give_the_reference_losses(triton):
    size = {"input_size": 6, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 1, "num_heads": 2}
    x, y = torch.randn(8, 1, 6, 6, device=DEVICE), torch.arange(8, device=DEVICE) % 3
    losses = {}
    for name in ("reference", "triton"):
        torch.manual_seed(0)
        net = DiT(**size, num_classes=3).to(DEVICE)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        generator = torch.Generator(DEVICE).manual_seed(0)
        losses[name] = []
        with use_backend(name):
            for _ in range(3):
                loss = MeanFlow(omega=1.0, kappa=0.5, norm_p=0.0)(net, x, y, generator=generator).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[name].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["reference"], rel=2e-5)


def test_what_they_do_not_serve_is_refused_by_name(triton):
    with pytest.raises(NotImplementedError, match=r"attention: the triton backend cannot serve.*multiple of 4.*got 7"):
        attention(*torch.randn(3, 1, 5, 1, 7, device=DEVICE))
    with pytest.raises(NotImplementedError, match=r"expected float16, bfloat16 or float32, got torch.float64"):
        attention(*torch.randn(3, 1, 5, 1, 8, dtype=torch.float64, device=DEVICE))


def test_the_operators_obey_pytorchs_rules(triton):
    q, k, v = (torch.randn(2, 9, 2, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    dots = [torch.randn(1, 9, 2, 8, device=DEVICE) for _ in range(3)]
    for tangents in (dots, [None, None, None], [None, dots[1], None]):
        torch.library.opcheck(op.forward.custom_op, (q, k, v, *tangents, 0.3, False))
    with torch.no_grad():
        o, _, lse = op.forward(q, k, v, None, None, None, 0.3, True)
        saved = [a.detach() for a in (torch.randn_like(o), q, k, v, o, lse)]
    torch.library.opcheck(op._backward.custom_op, (*saved, 0.3, True))


def test_tf32_is_what_the_user_asked_pytorch_for():
    pytest.importorskip("triton", minversion="3.4")
    q, matmul = torch.zeros(1), torch.backends.cuda.matmul
    assert op.product_precision(q) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert op.product_precision(q) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert op.product_precision(q) == "ieee"
    if hasattr(matmul, "fp32_precision"):  # torch 2.9
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            assert op.product_precision(q) == "tf32"
            assert op.product_precision(q.half()) == "ieee"
            with pytest.raises(RuntimeError, match="legacy"):
                torch.get_float32_matmul_precision()  # the older question has no answer now
        finally:
            matmul.fp32_precision = before
