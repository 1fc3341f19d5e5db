"""What each op of the modern DiT line owes beside accuracy, on the Triton backend."""

import functools

import oracles
import pytest
import torch
from both_backends import DEVICE
from memory import saved_bytes
from op_checks import assert_compiles, assert_forward_mode, assert_no_gradient_through_the_tangent

from mfkernels import (
    Dual,
    RMSNorm,
    SwiGLU,
    attention,
    dual_aware,
    layer_scale_residual,
    linear_map,
    qk_norm_rotary,
    rms_norm,
    rotary,
    split_map,
    swiglu,
    use_backend,
)
from mfkernels.backend import recorded_choices
from mfkernels.layer_scale_residual import op as layer_scale_op
from mfkernels.rms_norm import op as rms_norm_op
from mfkernels.rotary import op as rotary_op
from mfkernels.swiglu import op as swiglu_op
from mfkernels.testing import assert_dual, relative_error

B, N, H, d = 3, 5, 2, 24
D = H * d
ANGLES = torch.arange(N)[:, None] * torch.linspace(1, 0.1, d // 2)  # [N, d/2]
COS, SIN = ANGLES.cos().to(DEVICE), ANGLES.sin().to(DEVICE)


@pytest.fixture(autouse=True)
def _reset_the_compiler(triton):
    torch.compiler.reset()  # many ops through one compiled function: past eight, fullgraph gives up
    yield
    torch.compiler.reset()


def heads(x):
    return x.unflatten(-1, (-1, d)).split(H, 2)[:2]  # q and k [B, N, H, d], views of a packed qkv [B, N, 3·D]


def both(fn):
    """A function of q and k as one of a packed projection, its two outputs next to each other."""

    @functools.wraps(fn)
    def run(qkv, *rest, **named):
        out = fn(*split_map(heads, qkv), *rest, **named)
        if not isinstance(out[0], Dual):
            return torch.cat(out, 2)
        return Dual(torch.cat([x.primal for x in out], 2), torch.cat([x.tangent for x in out], 2))

    return run


rotary_of_qkv = both(lambda q, k: rotary(q, k, COS, SIN))
qk_norm_of_qkv = both(lambda q, k, q_weight, k_weight: qk_norm_rotary(q, k, q_weight, k_weight, COS, SIN))


def rotary_oracle(qkv):
    return torch.cat([oracles.rotary(x, COS, SIN) for x in heads(qkv)], 2)


def qk_norm_oracle(qkv, q_weight, k_weight):
    q, k = heads(qkv)
    return torch.cat([oracles.rotary(oracles.rms_norm(x, w), COS, SIN) for x, w in ((q, q_weight), (k, k_weight))], 2)


# op, oracle, shapes of its inputs, which of them carry tangents
OPS = {
    "rms_norm": (rms_norm, oracles.rms_norm, {"x": (B, N, D), "weight": (D,)}, ["x"]),
    "swiglu": (swiglu, oracles.swiglu, {"a": (B, N, D), "b": (B, N, D)}, ["a", "b"]),
    "layer_scale_residual": (
        layer_scale_residual,
        oracles.layer_scale_residual,
        {"x": (B, N, D), "y": (B, N, D), "scale": (D,)},
        ["x", "y"],
    ),
    "rotary": (rotary_of_qkv, rotary_oracle, {"qkv": (B, N, 3 * D)}, ["qkv"]),
    "qk_norm_rotary": (
        qk_norm_of_qkv,
        qk_norm_oracle,
        {"qkv": (B, N, 3 * D), "q_weight": (d,), "k_weight": (d,)},
        ["qkv"],
    ),
}
every_op = pytest.mark.parametrize(("op", "oracle", "shapes", "duals"), OPS.values(), ids=OPS)


def draw(shapes, dtype=torch.float32, device=DEVICE):
    return {name: torch.randn(shape, dtype=dtype).to(device) for name, shape in shapes.items()}


@every_op
def test_forward_mode_ad(op, oracle, shapes, duals):
    assert_forward_mode(op, oracle, draw(shapes, torch.float64), duals, bound=6e-7)


@every_op
def test_a_gradient_through_the_tangent_is_an_error(op, oracle, shapes, duals):
    assert_no_gradient_through_the_tangent("", op, draw(shapes), duals)


@every_op
@pytest.mark.parametrize("rows", [1, B])
def test_compile_as_one_graph(op, oracle, shapes, duals, rows):
    inputs = draw(shapes)
    assert_compiles(op, [Dual(x, torch.randn_like(x[:rows])) if n in duals else x for n, x in inputs.items()])


@every_op
def test_backward_keeps_the_inputs_at_most_and_nothing_of_the_tangent(op, oracle, shapes, duals):
    leaves = {name: x.requires_grad_() for name, x in draw(shapes).items()}
    with_tangents = {n: Dual(x, torch.randn_like(x)) if n in duals else x for n, x in leaves.items()}
    plain = saved_bytes(lambda: op(**leaves))
    assert plain <= sum(x.nbytes for x in leaves.values()) + COS.nbytes + SIN.nbytes
    assert saved_bytes(lambda: op(**with_tangents)) == plain


@every_op
def test_float64_is_refused_by_name(op, oracle, shapes, duals):
    with pytest.raises(
        NotImplementedError, match=r"the triton backend cannot serve.*: expected float16.*torch.float64"
    ):
        op(**draw(shapes, torch.float64))


@every_op
def test_no_samples_and_no_tangent_rows(op, oracle, shapes, duals):
    inputs = draw(shapes)
    leaves = {n: (x[:0] if n in duals else x).clone().requires_grad_() for n, x in inputs.items()}
    out = op(**{n: Dual(x, x.detach()) if n in duals else x for n, x in leaves.items()})
    assert out.primal.shape == out.tangent.shape == (0, *out.primal.shape[1:])
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(out.primal.sum(), list(leaves.values())))
    out = op(**{n: Dual(x, x[:0]) if n in duals else x for n, x in inputs.items()})
    assert out.tangent.shape == (0, *out.primal.shape[1:])
    assert torch.equal(out.primal, op(**inputs))


@every_op
def test_weights_of_another_dtype(op, oracle, shapes, duals):
    """As under autocast: activations in half precision, parameters in float32."""
    leaves = {n: (x.half() if n in duals else x).requires_grad_() for n, x in draw(shapes).items()}
    out = op(**{n: Dual(x, torch.ones_like(x)) if n in duals else x for n, x in leaves.items()})
    assert out.primal.dtype == out.tangent.dtype == torch.float16
    assert relative_error(out.primal, oracle(**{n: x.double() for n, x in leaves.items()})) <= 5e-4  # measured 2.4e-4
    grads = torch.autograd.grad(out.primal.sum(), list(leaves.values()))
    assert [g.dtype for g in grads] == [x.dtype for x in leaves.values()]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_under_autocast(backend):
    """A float32 stream, bfloat16 branches, float32 parameters: dtypes are the same on every backend."""
    block, x = Block().to(DEVICE), torch.randn(B, N, D, device=DEVICE)
    mixed = Dual(x, torch.randn_like(x)), Dual(x.bfloat16(), x.bfloat16())
    with use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        h = block.mlp.w1(block.norm1(mixed[0]))
        assert (h.dtype, h.tangent.dtype) == (torch.bfloat16, torch.bfloat16)
        for out in (swiglu(*mixed), layer_scale_residual(*mixed, block.mlp_scale)):
            assert (out.primal.dtype, out.tangent.dtype) == (torch.float32, torch.float32)
        assert rms_norm(mixed[1], block.norm1.weight).dtype == torch.bfloat16
        out = swiglu(block.mlp.w1(mixed[0]), block.mlp.w3(mixed[0]))
        layer_scale_residual(mixed[0], block.mlp.w2(out), block.mlp_scale).primal.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.mlp.parameters())


def test_opcheck():
    x, y = (torch.randn(B, N, D, device=DEVICE, requires_grad=True) for _ in range(2))
    vector = torch.randn(D, device=DEVICE, requires_grad=True)
    dot = torch.randn(1, N, D, device=DEVICE)
    for x_dot in (dot, None):
        torch.library.opcheck(rms_norm_op._forward.custom_op, (x, x_dot, vector, 1e-6))
        torch.library.opcheck(swiglu_op._forward.custom_op, (x, y, x_dot, dot))
        torch.library.opcheck(swiglu_op._forward.custom_op, (x, y, dot, x_dot))
        torch.library.opcheck(layer_scale_op._forward.custom_op, (x, y, dot, x_dot, vector))
    x, y, vector = x.detach(), y.detach(), vector.detach()
    torch.library.opcheck(rms_norm_op._backward.custom_op, (dot, x[:1], vector, 1e-6))
    torch.library.opcheck(swiglu_op._backward.custom_op, (dot, x[:1], y[:1]))
    torch.library.opcheck(layer_scale_op._backward.custom_op, (dot, y[:1], vector))


def test_opcheck_rotary():
    q, k = (torch.randn(B, N, H, d, device=DEVICE, requires_grad=True) for _ in range(2))
    weights = [torch.randn(d, device=DEVICE, requires_grad=True) for _ in range(2)]
    dot = torch.randn(1, N, H, d, device=DEVICE)
    for dots in ((dot, dot), (None, dot), (None, None)):
        torch.library.opcheck(rotary_op._forward.custom_op, (q, k, *dots, None, None, COS, SIN, 0.0, False))
        torch.library.opcheck(rotary_op._forward.custom_op, (q, k, *dots, *weights, COS, SIN, 1e-6, True))
    q, k, *weights = (a.detach() for a in (q, k, *weights))
    torch.library.opcheck(rotary_op._backward.custom_op, (q, k, COS, SIN, True))
    torch.library.opcheck(rotary_op._norm_backward.custom_op, (k, q, q, k, *weights, COS, SIN, 1e-6, False))


@pytest.mark.parametrize("op", [rotary, qk_norm_rotary])
def test_one_of_two_results_unused(op):
    q, k = (torch.randn(B, N, H, d, device=DEVICE, requires_grad=True) for _ in range(2))
    weights = [torch.randn(d, device=DEVICE) for _ in range(2)] if op is qk_norm_rotary else []
    both_used = torch.autograd.grad(sum(x.square().sum() for x in op(q, k, *weights, COS, SIN)), (q, k))
    for used, grads in enumerate(both_used):
        alone = torch.autograd.grad(op(q, k, *weights, COS, SIN)[used].square().sum(), (q, k))
        assert torch.equal(alone[used], grads)
        assert alone[1 - used].abs().sum() == 0


def test_many_programs_share_the_weight_gradients(monkeypatch):
    """More blocks than partial sums: each program takes several."""
    from mfkernels import launch

    monkeypatch.setattr(launch, "_lookup", lambda request: _small_blocks(dict(request)))
    x, y = (torch.randn(4, 3, D, dtype=torch.float64) for _ in range(2))
    bound = 4e-7
    scale = torch.randn(D, dtype=torch.float64)
    options = {"dtype": torch.float32, "bound": bound, "device": DEVICE}
    assert_dual(rms_norm, oracles.rms_norm, {"x": x, "weight": scale}, duals=["x"], **options)
    inputs = {"x": x, "y": y, "scale": scale}
    assert_dual(layer_scale_residual, oracles.layer_scale_residual, inputs, duals=["x", "y"], **options)
    _, _, shapes, duals = OPS["qk_norm_rotary"]
    assert_dual(qk_norm_of_qkv, qk_norm_oracle, draw(shapes, torch.float64, "cpu"), duals=duals, **options)


def _small_blocks(request):
    sizes = {"BLOCK_S": 2, "BLOCK_D": 16} if request["op"] == "sum_partials" else {"BLOCK_R": 2}
    parts = {"PARTS": 3} if request["op"].endswith("backward") else {}
    return {**sizes, **parts, "num_warps": 4, "num_stages": 1}


@dual_aware
class Block(torch.nn.Module):
    """A block as in improved MeanFlow: pre-norms, QK-norm, rotary, SwiGLU, a learned factor on each branch."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.q_norm, self.k_norm = RMSNorm(D), RMSNorm(D), RMSNorm(d), RMSNorm(d)
        self.qkv = torch.nn.Parameter(torch.randn(3 * D, D) / D**0.5)
        self.mlp = SwiGLU(D, 50)
        self.attn_scale, self.mlp_scale = (torch.nn.Parameter(torch.randn(D)) for _ in range(2))

    def forward(self, x):
        qkv = linear_map(lambda a: torch.nn.functional.linear(a, self.qkv), self.norm1(x))  # [B, N, 3·D]
        q, k, v = split_map(lambda a: a.unflatten(-1, (3, H, d)).unbind(2), qkv)  # [B, N, H, d]
        q, k = qk_norm_rotary(q, k, self.q_norm.weight, self.k_norm.weight, COS, SIN)
        o = linear_map(lambda a: a.flatten(2), attention(q, k, v))  # [B, N, D]
        x = layer_scale_residual(x, o, self.attn_scale)
        return layer_scale_residual(x, self.mlp(self.norm2(x)), self.mlp_scale)


def test_a_block_is_the_reference_block_eager_and_compiled():
    block = Block().to(DEVICE)
    x = torch.randn(B, N, D, device=DEVICE)
    x_dot = torch.randn_like(x[:2])
    results = {}
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for name, backend, fn in (
        ("reference", "reference", block),
        ("triton", "triton", block),
        ("compiled", "triton", compiled),
    ):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        with use_backend(backend), recorded_choices() as choices:
            y = fn(Dual(leaf, x_dot))
            y.primal.square().sum().backward()
        assert name == "compiled" or {choices[op] for op in OPS if op != "rotary"} == {backend}
        results[name] = [y.primal, y.tangent, leaf.grad, *(p.grad.clone() for p in block.parameters())]
    for name in ("triton", "compiled"):
        for ours, reference in zip(results[name], results["reference"], strict=True):
            assert relative_error(ours, reference) <= 2e-6
