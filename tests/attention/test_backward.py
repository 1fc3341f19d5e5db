"""Attention's backward is chosen per call: our own, PyTorch's, flash-attn's. What only a GPU can run has a stand-in."""

import sys
from types import ModuleType, SimpleNamespace

import oracles
import pytest
import torch
from attention_cases import CASES, DTYPES, Case, check_backward, draw, inputs, packed
from both_backends import DEVICE
from op_checks import forward_ad

from mfkernels import attention, use_backend
from mfkernels.attention import backward, op, projected
from mfkernels.attention.backward import PACKAGES, attention_backward_by, by_length, unsupported
from mfkernels.attention.projected import projected_attention
from mfkernels.backend import PARTS, recorded_choices, requested_backend
from mfkernels.testing import assert_dual, relative_error

pytest.importorskip("triton", minversion="3.4")

# measured on a CPU with "flash": float16 4.7e-4, float32 5.4e-7
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1.1e-6}
OTHERS = [name for name in PARTS["attention_backward"] if name != "triton"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if not case.causal or case.N_q == case.N_kv], ids=str)
@pytest.mark.parametrize("name", OTHERS if DEVICE == "cuda" else ["flash"])
def test_anothers_backward_takes_our_output_and_lse(name: str, case: Case, dtype: torch.dtype) -> None:
    primals, _ = inputs(case, dtype)
    why_not = unsupported(name, *primals[:2], causal=case.causal)
    if why_not is not None:
        pytest.skip(why_not)

    def gradients(*args, **options):
        return attention_backward_by(name, *args, **options)

    check_backward(gradients, primals, case.D**-0.5, case.causal, bound=BOUND[dtype])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_chosen_by_the_call_of_the_forward(monkeypatch, is_causal, compiled):
    served: list[str] = []
    own = backward.attention_backward_by

    def counted(name, *args, **options):
        served.append(name)
        return own(name, *args, **options)

    monkeypatch.setattr(op, "attention_backward_by", counted)
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16

    def run(**qkv):
        return attention(**qkv, is_causal=is_causal)

    fn = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with use_backend("triton,attention_backward=flash"):
        assert_dual(
            fn,
            lambda **qkv: oracles.attention(**qkv, is_causal=is_causal),
            packed(2, 17, 2, 24),
            duals="qkv",
            dtype=dtype,
            bound=6.5e-7 if DEVICE == "cpu" else 1.5e-3,
            device=DEVICE,
        )
    assert served == ["flash"] * 3  # rows none, some and all

    q, k, v = (a.requires_grad_() for a in torch.randn(3, 1, 5, 1, 8, device=DEVICE, dtype=dtype))
    with use_backend("triton,attention_backward=flash"), recorded_choices() as chosen:
        first = attention(q, k, v)
    with use_backend("triton"):
        second = attention(q, k, v)
        assert requested_backend("attention") == "triton"
        for out, calls in ((first, 4), (second, 4)):  # called where another one is asked for
            out.sum().backward()
            assert len(served) == calls
    assert chosen == {"attention": "triton", "attention_backward": "flash"}


@pytest.mark.parametrize("transform", [torch.func.jvp, forward_ad])
def test_forward_mode_keeps_the_choice(transform, monkeypatch):
    served: list[str] = []
    own = backward.attention_backward_by
    monkeypatch.setattr(op, "attention_backward_by", lambda name, *a, **o: served.append(name) or own(name, *a, **o))
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    primals = tuple(torch.randn(2, 9, 2, 8, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(3))
    tangents = tuple(torch.randn_like(a) for a in primals)
    with use_backend("triton,attention_backward=flash"):
        out, _ = transform(attention, primals, tangents)
    got = torch.autograd.grad(out.square().sum(), primals)
    assert served == ["flash"]
    wide = [a.detach().double().requires_grad_() for a in primals]
    for mine, theirs in zip(got, torch.autograd.grad(oracles.attention(*wide).square().sum(), wide), strict=True):
        assert relative_error(mine, theirs) <= (1e-6 if DEVICE == "cpu" else 3e-3)
    with (
        use_backend("triton,attention_backward=cudnn" if DEVICE == "cpu" else "reference,attention_backward=cudnn"),
        pytest.raises(NotImplementedError, match="attention_backward=cudnn"),
    ):
        transform(attention, primals, tangents)


def test_the_operator_of_the_backward_obeys_pytorchs_rules():
    primals, _ = inputs(Case(9, 9, 8, B=2), torch.float32)
    with torch.no_grad():
        o, _, lse = op.forward(*primals, None, None, None, 0.3, True)
    torch.library.opcheck(
        op._backward.custom_op, (draw(tuple(o.shape), o.dtype, 7), *primals, o, lse, 0.3, True, "flash")
    )


def test_a_request_that_cannot_be_served_is_an_error_where_a_gradient_is_wanted():
    q, k, v = torch.randn(3, 1, 5, 1, 8, device=DEVICE)
    wanted = "attention: attention_backward=flash cannot serve this call: is_causal: expected as many keys as queries"
    with use_backend("triton,attention_backward=flash"):
        with torch.no_grad():
            attention(q, k[:, :3], v[:, :3], is_causal=True)  # no gradient, no backward
        with pytest.raises(NotImplementedError, match=wanted):
            attention(q, k[:, :3], v[:, :3], is_causal=True)
    with (
        use_backend("reference,attention_backward=flash"),
        pytest.raises(NotImplementedError, match="attention_backward=flash is of the triton and cuda forwards"),
    ):
        attention(q, k, v)
    with (
        pytest.raises(
            ValueError, match=r"name: attention_backward has the backends triton, cudnn, flash, .* got 'cuda'"
        ),
        use_backend("attention_backward=cuda"),
    ):
        pass


class OnGpu(SimpleNamespace):
    """What `unsupported` asks of a tensor, of one that need not exist."""

    device = torch.device("cuda")


def call(q_shape=(2, 256, 4, 64), kv_shape=None, dtype=torch.bfloat16):
    return OnGpu(shape=torch.Size(q_shape), dtype=dtype), OnGpu(shape=torch.Size(kv_shape or q_shape), dtype=dtype)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU for those questions: everything is there, flash-attn's packages are not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(backward, "_installed", lambda module: False)


def test_what_each_of_them_serves(hopper, monkeypatch):
    for name in ("triton", "cudnn", "flash"):
        assert unsupported(name, *call(), causal=True) is None
    for name in OTHERS:
        assert "float16 or bfloat16, got torch.float32" in unsupported(name, *call(dtype=torch.float32), causal=False)
        assert "multiple of 8 up to 256, got 12" in unsupported(name, *call((2, 64, 4, 12)), causal=False)
        assert "as many keys as queries" in unsupported(name, *call((2, 64, 4, 64), (2, 65, 4, 64)), causal=True)
        assert unsupported(name, *torch.zeros(2, 1, 5, 2, 8), causal=False) == (
            None if name == "flash" else "q: expected a CUDA tensor, got one on cpu"
        )
    for sizes in (((2, 64, 4, 136),), ((2, 64, 4, 64), (2, 64, 2, 64)), ((2, 63, 4, 64),)):
        assert "head dim up to 128, as many heads" in unsupported("cudnn", *call(*sizes), causal=False)
        assert unsupported("flash", *call(*sizes), causal=False) is None
    for name, (package, _, _) in PACKAGES.items():
        assert f"pip install {package}" in unsupported(name, *call(), causal=False)
    monkeypatch.setattr(backward, "_installed", lambda module: True)
    assert all(unsupported(name, *call(), causal=False) is None for name in PACKAGES)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert unsupported("flash-attn-2", *call(), causal=False) is None
    assert unsupported("flash", *call((2, 64, 4, 256)), causal=False) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert "head dim up to 192 on compute capability 8.9, got 256" in unsupported(
        "flash", *call((2, 64, 4, 256)), causal=False
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert unsupported("flash-attn-3", *call(), causal=False) == (
        "device: expected compute capability 9.x to 9.x, got 8.0"
    )


def test_by_length_is_the_fastest_expected_of_those_that_serve(hopper, monkeypatch):
    def chosen(N=512, *, causal=False, **options):
        return by_length(*call((2, N, 4, 64), **options), causal=causal)

    assert (chosen(511), chosen(512), chosen(4096)) == ("triton", "cudnn", "cudnn")
    assert chosen(kv_shape=(2, 511, 4, 64)) == "triton"
    assert chosen(kv_shape=(2, 512, 2, 64)) == "flash"  # grouped queries
    assert chosen(kv_shape=(2, 600, 4, 64), causal=True) == "triton"
    assert chosen(dtype=torch.float32) == "triton"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert chosen() == "flash"
    monkeypatch.setattr(backward, "_installed", lambda module: True)
    assert chosen() == "flash-attn-4"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert chosen() == "flash-attn-2"


@pytest.mark.parametrize("compiled", [False, True])
def test_by_length_chooses_for_each_call(monkeypatch, compiled):
    if DEVICE == "cuda":
        pytest.skip("a CPU has one that serves float32, flash")
    monkeypatch.setattr(backward, "LONG", 16)
    served: list[str] = []
    for module in (op, projected):
        own = module.attention_backward_by
        monkeypatch.setattr(
            module, "attention_backward_by", lambda name, *a, own=own, **o: served.append(name) or own(name, *a, **o)
        )
    weight = (torch.randn(96, 32) * 32**-0.5).requires_grad_()
    fn = torch.compile(projected_attention, fullgraph=True, backend="aot_eager") if compiled else projected_attention
    for N, name in ((15, "triton"), (16, "flash")):
        x = torch.randn(2, N, 32, requires_grad=True)
        with use_backend("triton,attention_backward=by-length"), recorded_choices() as chosen:
            out = fn(x, weight, None, 2)
        assert compiled or chosen["attention_backward"] == name
        grads = torch.autograd.grad(out.square().sum(), [x, weight])
        with use_backend("triton"):
            wanted = torch.autograd.grad(projected_attention(x, weight, None, 2).square().sum(), [x, weight])
        for ours, theirs in zip(grads, wanted, strict=True):
            assert relative_error(ours, theirs) <= 1.1e-6
        q, k, v = torch.randn(3, 1, N, 2, 8).requires_grad_().unbind()
        with use_backend("triton,attention_backward=by-length"):
            attention(q, k, v).sum().backward()
    assert served == ["flash", "flash"]


def test_determinism_is_respected(hopper, monkeypatch):
    q, k = call()
    x, lse = torch.zeros(1, 64, 1, 8), torch.zeros(1, 1, 64)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "use_deterministic_algorithms is on" in unsupported("cudnn", q, k, causal=False)
    assert unsupported("flash", q, k, causal=False) is None  # PyTorch makes it so itself
    with pytest.raises(RuntimeError, match=r"attention_backward=cudnn: torch\.use_deterministic_algorithms is on"):
        attention_backward_by("cudnn", x, x, x, x, x, lse, scale=1.0)


# ---------------------------------------------------------- flash-attn's packages: their signatures, by a stand-in each


def math_gradients(do, q, k, v, scale, causal):
    leaves = [a.detach().double().requires_grad_() for a in (q, k, v)]
    out = oracles.attention(*leaves, scale=scale, is_causal=causal)
    return [g.to(q.dtype) for g in torch.autograd.grad(out, leaves, do.double())]


def flash_attn_2(log):
    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        log.append((out, softmax_lse, deterministic))
        for mine, theirs in zip((dq, dk, dv), math_gradients(dout, q, k, v, softmax_scale, causal), strict=True):
            mine.copy_(theirs)

    return {"_flash_attn_backward": _flash_attn_backward}


def flash_attn_3(log):
    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        sequed_q=None,
        sequed_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dq=None,
        dk=None,
        dv=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        assert (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k) == (None,) * 6
        log.append((out, softmax_lse, deterministic))
        for mine, theirs in zip((dq, dk, dv), math_gradients(dout, q, k, v, softmax_scale, is_causal), strict=True):
            mine.copy_(theirs)

    return {"_flash_attn_backward": _flash_attn_backward}


def flash_attn_4(log):
    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, deterministic=False):
        log.append((out, lse, deterministic))
        return tuple(math_gradients(dout, q, k, v, softmax_scale, causal))

    return {"_flash_attn_bwd": _flash_attn_bwd}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stand_in", [flash_attn_2, flash_attn_3, flash_attn_4], ids=lambda f: f.__name__)
def test_flash_attn_is_called_by_its_signature(stand_in, causal, deterministic, monkeypatch):
    log: list[tuple] = []
    name = stand_in.__name__.replace("_", "-")
    path = PACKAGES[name][1]
    for depth in range(1, len(path.split(".")) + 1):
        monkeypatch.setitem(sys.modules, ".".join(path.split(".")[:depth]), ModuleType(path))
    for attribute, function in stand_in(log).items():
        setattr(sys.modules[path], attribute, function)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)

    q, k, v = torch.randn(3, 2, 9, 2, 8)
    k, v = k[:, :, :1], v[:, :, :1]  # two heads to one: the packages take groups as they are
    o, do = torch.randn(2, 9, 2, 8), torch.randn(1, 1, 1, 8).expand(2, 9, 2, 8)
    lse = torch.randn(2, 2, 9)
    got = attention_backward_by(name, do, q, k, v, o, lse, scale=0.3, causal=causal)
    for mine, theirs in zip(got, math_gradients(do, q, k, v, 0.3, causal), strict=True):
        assert relative_error(mine, theirs) == 0
        assert mine.is_contiguous()
    ((out, seen, flag),) = log
    assert out is o
    assert seen is lse
    assert flag is deterministic
