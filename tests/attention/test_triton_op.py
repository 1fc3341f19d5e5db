"""The public function on the Triton backend: autograd, torch.compile, forward mode. The kernels: test_kernels.py."""

import pytest
import torch
from memory import saved_bytes
from op_checks import forward_ad
from test_op import oracle, packed, separate

from meanflow.models import DiT, DiTBlock
from meanflow.objectives import MeanFlow
from mfkernels import Attention, Dual, attention, use_backend
from mfkernels.attention import op
from mfkernels.testing import assert_dual, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# measured in the interpreter: 5.3e-7, 3.3e-4; bfloat16 (a GPU only) not yet measured
BOUNDS = [(torch.float32, 1.05e-6), (torch.float16, 6.5e-4)] + ([(torch.bfloat16, 1.2e-2)] if DEVICE == "cuda" else [])

pytest.importorskip("triton", minversion="3.4")


@pytest.fixture(autouse=True)
def _triton(poison_empty):
    with use_backend("triton"):
        yield


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("B", "N", "H", "d"), [(3, 17, 2, 24), (2, 1, 1, 8), (2, 33, 1, 72)])
def test_packed(B, N, H, d, dtype, bound):
    assert_dual(attention, oracle, packed(B, N, H, d), duals="qkv", dtype=dtype, bound=bound, device=DEVICE)


@pytest.mark.parametrize("duals", ["q", "k", "v", "qk", "kv"])
def test_some_tangents_are_zero(duals):
    inputs = packed(2, 17, 1, 16)
    assert_dual(attention, oracle, inputs, duals=duals, dtype=torch.float32, bound=5e-7, device=DEVICE)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("H_kv", [1, 2])
def test_cross_grouped_causal(H_kv, is_causal):
    assert_dual(
        lambda **kw: attention(**kw, scale=0.3, is_causal=is_causal),
        lambda **kw: oracle(**kw, scale=0.3, is_causal=is_causal),
        separate(2, 19, 17, 2, H_kv, 16),
        duals="qkv",
        dtype=torch.float32,
        bound=6e-7,
        device=DEVICE,
    )


def leaves(*shape):
    return [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3)]


def test_opcheck():
    q, k, v = leaves(2, 9, 2, 8)
    dots = [torch.randn(1, 9, 2, 8, device=DEVICE) for _ in range(3)]
    for tangents in (dots, [None, None, None], [None, dots[1], None]):
        torch.library.opcheck(op.forward.custom_op, (q, k, v, *tangents, 0.3, False))
    with torch.no_grad():
        o, _, lse = op.forward(q, k, v, None, None, None, 0.3, True)
        saved = [a.detach() for a in (torch.randn_like(o), q, k, v, o, lse)]
    torch.library.opcheck(op._backward.custom_op, (*saved, 0.3, True))


@pytest.mark.parametrize("transform", [torch.func.jvp, forward_ad])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_forward_mode_ad(transform, compiled, backend):
    primals, tangents = leaves(2, 9, 2, 8), [torch.randn(2, 9, 2, 8, device=DEVICE) for _ in range(3)]

    def run(*primals):
        return transform(attention, tuple(primals), tuple(tangents))

    with use_backend(backend):
        fn = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        out, out_dot = fn(*primals)
        grads = torch.autograd.grad(out.square().sum(), primals)
    wide = [p.detach().double().requires_grad_() for p in primals]
    ref, ref_dot = torch.func.jvp(oracle, tuple(wide), tuple(t.double() for t in tangents))
    assert relative_error(out, ref) <= 5e-7
    assert relative_error(out_dot, ref_dot) <= 1e-6
    for g, g_ref in zip(grads, torch.autograd.grad(oracle(*wide).square().sum(), wide), strict=True):
        assert relative_error(g, g_ref) <= 1e-6


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_gradient_through_the_tangent_is_an_error(backend):
    primals, tangents = tuple(leaves(1, 5, 1, 8)), tuple(torch.randn(3, 1, 5, 1, 8, device=DEVICE))
    with use_backend(backend):
        out, out_dot = torch.func.jvp(attention, primals, tangents)
        with pytest.raises(RuntimeError, match="through its forward-mode tangent"):
            (out.sum() + out_dot.sum()).backward()
        out, _ = torch.func.jvp(attention, primals, tangents)
        out.sum().backward()  # the tangent unused: no complaint


def test_a_block_on_duals_compiles_as_one_graph_and_gradients_reach_qkv():
    block = DiTBlock(32, 2).to(DEVICE)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, c = torch.randn(3, 9, 32, device=DEVICE), torch.randn(3, 32, device=DEVICE)
    duals = Dual(x, torch.randn_like(x[:2])), Dual(c, torch.randn_like(c[:2]))
    results = []
    for fn in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        block.zero_grad()
        y = fn(*duals)
        y.primal.square().sum().backward()
        results.append((y.primal, y.tangent, block.attn.qkv.weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().sum() > 0
        assert relative_error(compiled, eager) <= 5e-7


def test_backward_keeps_nothing_of_the_tangent():
    net, x = Attention(24, 3).to(DEVICE), torch.randn(4, 7, 24, device=DEVICE)
    assert saved_bytes(lambda: net(Dual(x, torch.randn_like(x)))) == saved_bytes(lambda: net(x)) > 0


def test_what_it_does_not_serve_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"attention: the triton backend cannot serve.*multiple of 4.*got 7"):
        attention(*torch.randn(3, 1, 5, 1, 7, device=DEVICE))
    with pytest.raises(NotImplementedError, match=r"expected float16, bfloat16 or float32, got torch.float64"):
        attention(*torch.randn(3, 1, 5, 1, 8, device=DEVICE, dtype=torch.float64))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_that_is_not_positive(scale, is_causal):
    assert_dual(
        lambda **kw: attention(**kw, scale=scale, is_causal=is_causal),
        lambda **kw: oracle(**kw, scale=scale, is_causal=is_causal),
        separate(2, 19, 17, 2, 1, 16),
        duals="qkv",
        dtype=torch.float32,
        bound=6e-7,
        device=DEVICE,
    )


def test_empty_batch():
    out = attention(*(Dual(a, a) for a in torch.randn(3, 0, 5, 1, 8, device=DEVICE)))
    assert out.primal.shape == out.tangent.shape == (0, 5, 1, 8)


def test_training_steps_give_the_reference_losses():
    size = {"input_size": 6, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 1, "num_heads": 2}
    x, y = torch.randn(8, 1, 6, 6, device=DEVICE), torch.arange(8, device=DEVICE) % 3
    losses = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        net = DiT(**size, num_classes=3).to(DEVICE)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        generator = torch.Generator(DEVICE).manual_seed(0)
        losses[backend] = []
        with use_backend(backend):
            for _ in range(3):
                loss = MeanFlow(omega=1.0, kappa=0.5, norm_p=0.0)(net, x, y, generator=generator).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["reference"], rel=2e-5)


def test_tf32_is_what_the_user_asked_pytorch_for():
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
