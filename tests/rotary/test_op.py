import oracles
import pytest
import torch
from both_backends import DEVICE, both, cases

from mfkernels import Dual, qk_norm_rotary, rms_norm, rotary, split_map


def tables(N, d, dtype=torch.float32):
    """Two tokens without a position in front, where there is room for them."""
    frequencies = 100.0 ** -torch.linspace(0, 1, d // 2, dtype=torch.float64)  # [d/2]
    angles = torch.arange(N)[:, None] * frequencies  # [N, d/2]
    angles[: min(2, N - 1)] = 0
    return angles.cos().to(dtype), angles.sin().to(dtype)


def packed(B, N, H, d, H_kv=None, dtype=torch.float64):
    """A packed projection and the weights of the norms."""
    H_kv = H if H_kv is None else H_kv
    weights = 1 + 0.3 * torch.randn(2, d, dtype=dtype)
    return {
        "qkv": torch.randn(B, N, (H + 2 * H_kv) * d, dtype=dtype),
        "q_weight": weights[0],
        "k_weight": weights[1],
    }


def heads(qkv, H, d, H_kv=None):
    """q and k as views."""
    qkv = qkv.unflatten(-1, (-1, d))
    return qkv[:, :, :H], qkv[:, :, H : H + (H if H_kv is None else H_kv)]


def small(B, N, H, d):
    """Arguments of `qk_norm_rotary` but the tables."""
    m = packed(B, N, H, d, dtype=torch.float32)
    q, k = heads(m.pop("qkv"), H, d)
    return {"q": q, "k": k, **m}


SHAPES = [
    (4, 7, 2, 24, 2),
    (2, 1, 1, 72, 1),
    (3, 17, 4, 6, 2),
    (1, 1, 1, 4, 1),
    (1, 276, 2, 64, 2),
    (2, 3, 1, 80, 1),
]
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True])


def joined(q, k):
    """Both outputs as one, so that one dual check sees both."""
    if not isinstance(q, Dual) and not isinstance(k, Dual):
        return torch.cat((q, k), 2)
    q, k = (x if isinstance(x, Dual) else Dual(x) for x in (q, k))
    rows = max(q.rows, k.rows)
    tangents = [x.primal.new_zeros(rows, *x.shape[1:]) if x.tangent is None else x.tangent for x in (q, k)]
    return Dual(torch.cat((q.primal, k.primal), 2), torch.cat(tangents, 2))


def bind(op, N, H, d, H_kv, interleaved):
    """The op and its oracle on one packed projection, with the same float32 tables."""
    cos, sin = tables(N, d)

    def run(qkv, *weights, **named):
        q, k = split_map(lambda a: heads(a, H, d, H_kv), qkv)
        return joined(*op(q, k, *weights, **named, cos=cos.to(DEVICE), sin=sin.to(DEVICE), interleaved=interleaved))

    def oracle(qkv, q_weight=None, k_weight=None):
        q, k = heads(qkv, H, d, H_kv)
        if q_weight is not None:
            q, k = oracles.rms_norm(q, q_weight), oracles.rms_norm(k, k_weight)
        return torch.cat([oracles.rotary(x, cos.double(), sin.double(), interleaved) for x in (q, k)], 2)

    return run, oracle


backend = both()
case = cases(
    reference=(6.5e-16, 3.2e-7, 7e-3),  # measured: 3.2e-16, 1.6e-7, 3.5e-3
    triton=(4e-7, 5.3e-4, 1.15e-2),  # 1.9e-7, 2.6e-4, 5.7e-3
)


@INTERLEAVED
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [rotary, qk_norm_rotary])
def test_against_float64(op, shape, case, interleaved):
    inputs = packed(*shape)
    if op is rotary:
        inputs = {"qkv": inputs["qkv"]}
    run, oracle = bind(op, *shape[1:], interleaved)
    case.check(run, oracle, inputs, ["qkv"])


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("op", [rotary, qk_norm_rotary])
def test_one_tangent_alone(op, name, backend):
    m, (cos, sin) = small(3, 5, 2, 8), tables(5, 8)
    args = {"q": m["q"], "k": m["k"]} if op is rotary else m
    both = op(**{**args, "q": Dual(m["q"], m["k"][:2]), "k": Dual(m["k"], m["q"][:2])}, cos=cos, sin=sin)
    dual = {"q": Dual(m["q"], m["k"][:2]), "k": Dual(m["k"], m["q"][:2])}[name]
    q, k = op(**{**args, name: dual}, cos=cos, sin=sin)
    alone, other = (q, k) if name == "q" else (k, q)
    assert torch.equal(alone.tangent, both["qk".index(name)].tangent)
    assert torch.equal(other, both["kq".index(name)].primal)


@INTERLEAVED
def test_scores_depend_on_the_distance_alone(backend, interleaved):
    cos, sin = tables(9, 8)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 9, 1, 8)
    q, k = rotary(q, k, cos, sin, interleaved=interleaved)
    scores = torch.einsum("bihd,bjhd->bij", q, k)[0, 2:, 2:]  # [7, 7] between tokens with positions
    for offset in range(-3, 4):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_tokens_without_a_position_are_left_alone(backend):
    m = small(2, 7, 2, 8)
    q, k = rotary(m["q"], m["k"], *tables(7, 8))
    assert torch.equal(q[:, :2], m["q"][:, :2])
    assert torch.equal(k[:, :2], m["k"][:, :2])
    assert not torch.isclose(q[:, 2:], m["q"][:, 2:]).all(-1).any()
    assert q.is_contiguous()
    assert k.is_contiguous()


def test_the_two_pairings_are_one_permutation_apart(backend):
    m, (cos, sin) = small(2, 5, 2, 8), tables(5, 8)
    order = torch.arange(8).view(2, 4).T.flatten()  # channel of each place: 0, 4, 1, 5, …
    half, _ = rotary(m["q"], m["k"], cos, sin)
    interleaved, _ = rotary(m["q"][..., order], m["k"], cos, sin, interleaved=True)
    assert torch.equal(half[..., order], interleaved)


def test_fused_is_the_norm_then_the_rotation(backend):
    m, (cos, sin) = small(2, 7, 2, 8), tables(7, 8)
    q, k = qk_norm_rotary(**m, cos=cos, sin=sin, eps=1e-3)
    normed_q, normed_k = rms_norm(m["q"], m["q_weight"], eps=1e-3), rms_norm(m["k"], m["k_weight"], eps=1e-3)
    for fused, separate in zip((q, k), rotary(normed_q, normed_k, cos, sin), strict=True):
        torch.testing.assert_close(fused, separate)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_the_gradients_of_weights_are_finite_without_eps(backend):
    """A block of heads has some that are not there."""
    q, k = torch.randn(2, 5, 1, 1, 8)
    weights = [torch.randn(8, requires_grad=True) for _ in range(2)]
    q, k = qk_norm_rotary(q, k, *weights, torch.ones(1, 4), torch.zeros(1, 4), eps=0.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(q.sum() + k.sum(), weights))


def test_each_output_is_of_the_kind_of_its_argument(backend):
    m, (cos, sin) = small(2, 7, 2, 8), tables(7, 8)
    q, k = qk_norm_rotary(**{**m, "q": Dual(m["q"], m["q"][:1])}, cos=cos, sin=sin)
    assert q.tangent.shape == (1, 7, 2, 8)
    assert isinstance(k, torch.Tensor)
    q, k = rotary(m["q"], Dual(m["k"]), cos, sin)
    assert isinstance(q, torch.Tensor)
    assert isinstance(k, Dual)
    assert k.tangent is None


def test_tables_and_weights_may_be_wider_than_the_heads(backend):
    m = {name: a.bfloat16() if name in "qk" else a.float() for name, a in small(2, 7, 2, 8).items()}
    q, k = qk_norm_rotary(**{**m, "q": Dual(m["q"], m["q"])}, cos=tables(7, 8)[0], sin=tables(7, 8)[1])
    assert q.primal.dtype == q.tangent.dtype == k.dtype == torch.bfloat16


def test_bad_arguments(backend):
    m, (cos, sin) = small(2, 7, 2, 8), tables(7, 8)
    q, k = m["q"], m["k"]
    with pytest.raises(ValueError, match=r"cos: expected shape \(N, d/2\) of q = \(7, 4\), got \(6, 4\)"):
        rotary(q, k, cos[1:], sin)
    with pytest.raises(ValueError, match=r"k: expected \(2, 7, H_kv, 8\) to match q, got \(1, 7, 2, 8\)"):
        rotary(q, k[:1], cos, sin)
    with pytest.raises(ValueError, match="q: expected an even head dim"):
        rotary(q[..., :7], k[..., :7], cos, sin)
    with pytest.raises(ValueError, match="sin: the rotation's tables are constants"):
        rotary(q, k, cos, sin.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"k_weight: expected shape \(d,\) of q = \(8,\), got \(4,\)"):
        qk_norm_rotary(q, k, m["q_weight"], m["k_weight"][:4], cos, sin)
    with pytest.raises(NotImplementedError, match="cos: a forward-mode tangent of a parameter or table"):
        torch.func.jvp(lambda c: rotary(q, k, c, sin), (cos,), (cos,))
    with pytest.raises(ValueError, match="eps: expected a finite number"):
        qk_norm_rotary(**m, cos=cos, sin=sin, eps=float("nan"))


def test_no_rows(backend):
    q = torch.randn(0, 7, 2, 8)
    for x in rotary(Dual(q, q), Dual(q, q), *tables(7, 8, torch.float32)):
        assert x.primal.shape == x.tangent.shape == (0, 7, 2, 8)
