"""The CUDA kernels against the float64 oracle: on a Hopper GPU, or in the emulator of emulator/ where there is none."""

from collections.abc import Callable
from typing import Any

import cuda_emulator
import oracles
import pytest
import torch
from attention_cases import (
    CASES,
    LARGE_SCORE_LSE_BOUND,
    LARGE_SCORE_OUTPUT_BOUND,
    Case,
    assert_block_compiles,
    check_forward,
    draw,
    inputs,
    packed,
    scale_for_scores_of_eighty,
    separate,
    tangent_of_oracle,
    uncentred_tangent,
)
from both_backends import DEVICE
from torch import Tensor

from mfkernels import attention, use_backend
from mfkernels.attention import cuda, op
from mfkernels.testing import assert_dual, relative_error

pytest.importorskip("triton", minversion="3.4")  # the kernels' backward is Triton's

# Measured in the emulator, the largest over SERVED: float16 o 2.9e-4, o_dot 2.9e-4; bfloat16 o 2.2e-3, o_dot 2.3e-3;
# lse 4.3e-8. On a GPU: not yet.
OUTPUT_BOUND = {torch.float16: 5.8e-4, torch.bfloat16: 4.6e-3}
DTYPES = list(OUTPUT_BOUND)
MORE = [
    Case(1, 33, 64, B=2, B_t=2),
    Case(129, 257, 64, B=2, B_t=1, H=2, H_kv=2),
    Case(300, 300, 128, B=3, B_t=1, H=4, H_kv=2, causal=True),
    Case(200, 500, 96, B=1, B_t=0, causal=True),
    Case(256, 256, 72),
    Case(64, 300, 80, B=3, B_t=2),  # one warpgroup has no queries
    Case(260, 130, 80, causal=True),
]
SERVED = [case for case in CASES if case.D in cuda.HEAD_DIMS] + MORE

Forward = Callable[..., tuple[Tensor, Tensor | None, Tensor]]

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch.func.jvp, at first use
]


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> Forward:
    if DEVICE == "cuda":
        why_not = cuda.unavailable(torch.device("cuda", torch.cuda.current_device()))
        if why_not is not None:
            pytest.skip(why_not)
    else:
        module = cuda_emulator.extension()
        cuda_emulator.configure()
        monkeypatch.setattr("mfkernels.extension.load", lambda: module)
        monkeypatch.setattr(cuda, "unavailable", lambda device=None: None)
    return cuda.attention_forward


def check(forward: Forward, primals: list[Tensor], tangents: list[Any], scale: float, **options: Any) -> None:
    bound = options.pop("bound", OUTPUT_BOUND[primals[0].dtype])
    check_forward(forward, primals, tangents, scale, bound=bound, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_forward(case: Case, dtype: torch.dtype, forward: Forward) -> None:
    primals, tangents = inputs(case, dtype)
    check(forward, primals, tangents, case.D**-0.5, causal=case.causal)


@pytest.mark.parametrize("given", ["q", "k", "v", "qk", "qv", "kv", ""])
def test_absent_tangents_are_zero(given: str, forward: Forward) -> None:
    primals, tangents = inputs(Case(17, 140, 64, B=2), torch.float16)
    check(forward, primals, [x if name in given else None for name, x in zip("qkv", tangents, strict=True)], 0.125)


@pytest.mark.parametrize("D", [72, 128])
def test_views_of_a_packed_buffer_are_read_in_place(D: int, forward: Forward) -> None:
    primals = list(draw((2, 63, 3, 2, D), torch.float16, 0).unbind(2))
    tangents = list(draw((1, 63, 3, 2, D), torch.float16, 1).unbind(2))
    assert all(cuda.as_boxes(x) is x for x in (*primals, *tangents))
    check(forward, primals, tangents, D**-0.5)


def test_permuted_and_expanded_strides(forward: Forward) -> None:
    dtype = torch.float16
    q = draw((2, 3, 17, 64), dtype, 0).transpose(1, 2)  # heads outside tokens
    k = draw((63, 2, 3, 64), dtype, 1).transpose(0, 1)  # tokens outside the batch
    v = draw((2, 63, 3, 65), dtype, 2)[..., 1:]  # rows of no aligned length: copied
    q_dot = draw((1, 17, 1, 64), dtype, 3).expand(2, 17, 3, 64)  # strides of zero: copied
    k_dot = draw((2, 63, 64, 3), dtype, 4).transpose(2, 3)  # the last dimension is not contiguous: copied
    assert [cuda.as_boxes(x) is x for x in (q, k, v, q_dot, k_dot)] == [True, True, False, False, False]
    check(forward, [q, k, v], [q_dot, k_dot, None], 0.125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_eighty(dtype: torch.dtype, forward: Forward) -> None:
    primals, tangents = inputs(Case(63, 300, 64), dtype)
    q, k, _ = primals
    scale = scale_for_scores_of_eighty(q, k)
    bounds = {"bound": LARGE_SCORE_OUTPUT_BOUND[dtype], "lse_bound": LARGE_SCORE_LSE_BOUND}
    check(forward, primals, tangents, scale, **bounds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [10, 100, 1000])
def test_large_constant_tangent_scores(constant: int, dtype: torch.dtype, forward: Forward) -> None:
    """The centre keeps them out of what is rounded to 16 bits."""
    (q, k, v), tangents = inputs(Case(100, 276, 64), dtype)
    k[..., 0], tangents[0][..., 0] = 8, constant
    check(forward, [q, k, v], tangents, 1 / 8)
    uncentred = uncentred_tangent([q, k, v], tangents, 1 / 8)
    assert relative_error(uncentred, tangent_of_oracle([q, k, v], tangents, 1 / 8, False)) > 2 * OUTPUT_BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tangent_scores_of_negligible_first_keys(dtype: torch.dtype, forward: Forward) -> None:
    """The first tile has other tangent scores than the rest and no weight: it must not set the centre."""
    (q, k, v), tangents = inputs(Case(100, 400, 64), dtype)
    k[:, :128, :, 0], k[:, 128:, :, 0] = 4, -4
    q[..., 0], tangents[0][..., 0] = -8, 100
    check(forward, [q, k, v], tangents, 1 / 8)


def test_one_key(forward: Forward) -> None:
    """With one key o is v and the tangent is v_dot."""
    (q, k, v), tangents = inputs(Case(17, 1, 64, B=2, B_t=2), torch.float16)
    o, o_dot, _ = forward(q, k, v, *tangents, scale=0.5)
    assert torch.equal(o, v.expand_as(o))
    torch.testing.assert_close(o_dot, tangents[2].expand_as(o), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("empty", ["batch", "queries", "tangent"])
def test_empty_results(empty: str, forward: Forward) -> None:
    B, N_q, B_t = {"batch": (0, 17, 0), "queries": (2, 0, 2), "tangent": (2, 17, 0)}[empty]
    primals, tangents = inputs(Case(N_q, 17, 64, B=B, B_t=B_t), torch.float16)
    o, o_dot, lse = forward(*primals, *tangents, scale=0.3)
    assert o.shape == (B, N_q, 1, 64)
    assert o_dot is not None
    assert o_dot.shape == (B_t, N_q, 1, 64)
    assert lse.shape == (B, 1, N_q)
    if o.numel():
        assert relative_error(o, oracles.attention(*(x.double() for x in primals), 0.3)) < OUTPUT_BOUND[o.dtype]


def test_repeats_bit_for_bit(forward: Forward) -> None:
    primals, tangents = inputs(Case(300, 300, 72, B=3, B_t=2, H=2, H_kv=1), torch.bfloat16)
    first, second = (forward(*primals, *tangents, scale=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has one schedule: its own")
@pytest.mark.parametrize(("D", "causal"), [(64, False), (72, True), (128, False)])
def test_no_schedule_changes_a_bit(D: int, causal: bool, forward: Forward) -> None:
    """Copies and products early or late, in any order, and one block or many for the work: the same result."""
    primals, tangents = inputs(Case(300, 300, D, B=2, B_t=1, causal=causal), torch.float16)
    expected = None
    for seed, (copies, products, blocks) in enumerate(
        [(False, False, 1), (True, False, 1), (False, True, 5), (True, True, 2), (False, False, 100)]
    ):
        cuda_emulator.configure(eager_copies=copies, eager_products=products, multiprocessors=blocks, seed=seed)
        got = forward(*primals, *tangents, scale=0.1, causal=causal)
        expected = expected or got
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ------------------------------------------------------------------------------------------------- the public function
# Its backward is Triton's.

# measured in the emulator: 3.4e-4
OP_BOUND = 6.8e-4


@pytest.mark.parametrize("scale", [None, 0.0, -0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_public_function(is_causal: bool, scale: float | None, forward: Forward) -> None:
    with use_backend("cuda"):
        assert_dual(
            lambda **kw: attention(**kw, scale=scale, is_causal=is_causal),
            lambda **kw: oracles.attention(**kw, scale=scale, is_causal=is_causal),
            separate(2, 19, 17, 2, 1, 64) if is_causal else packed(2, 33, 1, 72),
            duals="qkv",
            dtype=torch.float16,
            bound=OP_BOUND,
            device=DEVICE,
        )


def test_opcheck(forward: Forward) -> None:
    primals, tangents = inputs(Case(9, 9, 64, B=2), torch.float16)
    for dots in (tangents, [None, None, None]):
        torch.library.opcheck(op.forward.custom_op, (*primals, *dots, 0.125, False, "cuda"))


def test_a_block_compiles_as_one_graph_with_attention_alone_on_cuda(forward: Forward) -> None:
    with use_backend("reference,attention=cuda"), torch.autocast(DEVICE, torch.float16):
        assert_block_compiles(64, 1, std=0.1, bound=2e-3)  # autocast casts elsewhere in a graph


def test_what_it_does_not_serve_is_refused_by_name(forward: Forward) -> None:
    half = {"device": DEVICE, "dtype": torch.float16}
    with use_backend("cuda"):
        with pytest.raises(
            NotImplementedError, match=r"attention: the cuda backend cannot serve.*72, 80, 96, 128, got 8"
        ):
            attention(*torch.randn(3, 1, 5, 1, 8, **half))
        with pytest.raises(NotImplementedError, match=r"q: expected float16 or bfloat16, got torch.float32"):
            attention(*torch.randn(3, 1, 5, 1, 64, device=DEVICE))


def test_tangents_of_different_rows_are_refused(forward: Forward) -> None:
    x = torch.zeros(2, 4, 1, 64, device=DEVICE, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"q_dot, k_dot, v_dot: expected the same number of batch rows, got \[2, 1\]"):
        forward(x, x, x, x, x[:1], None, scale=1.0)
