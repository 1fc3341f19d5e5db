"""The Triton kernels against a float64 oracle written independently of them."""

import inspect

import oracles
import pytest
import torch
from attention_cases import (
    CASES,
    DTYPES,
    GRADIENT_BOUND,
    LARGE_SCORE_GRADIENT_BOUND,
    LARGE_SCORE_LSE_BOUND,
    LARGE_SCORE_OUTPUT_BOUND,
    OUTPUT_BOUND,
    Case,
    check_backward,
    check_forward,
    draw,
    inputs,
    scale_for_scores_of_eighty,
    tangent_of_oracle,
    uncentred_tangent,
)
from both_backends import DEVICE

from mfkernels.testing import relative_error

pytest.importorskip("triton", minversion="3.4")

from mfkernels.attention.backward_kernels import attention_backward
from mfkernels.attention.kernels import attention_forward
from mfkernels.attention.tiles import row_strides, split_head_dim
from mfkernels.launch import Launch, find_config, forced_config, recorded

# Triton's interpreter does this itself in every loop with a runtime bound (3.6, numpy 2.3).
pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch.func.jvp, at first use
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    primals, tangents = inputs(case, dtype)
    check_forward(attention_forward, primals, tangents, case.D**-0.5, case.causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case, dtype: torch.dtype) -> None:
    primals, _ = inputs(case, dtype)
    check_backward(attention_backward, primals, case.D**-0.5, case.causal)


@pytest.mark.parametrize("given", ["q", "k", "v", "qk", "qv", "kv", ""])
def test_absent_tangents_are_zero(given: str) -> None:
    primals, tangents = inputs(Case(17, 100, 24, B=2), torch.float32)
    check_forward(
        attention_forward, primals, [x if name in given else None for name, x in zip("qkv", tangents, strict=True)], 0.3
    )


def test_no_tangent_rows() -> None:
    primals, tangents = inputs(Case(17, 17, 8, B=2, B_t=0), torch.float32)
    o, o_dot, _ = attention_forward(*primals, *tangents, scale=0.3)
    assert o_dot.shape == (0, 17, 1, 8)
    assert relative_error(o, oracles.attention(*(x.double() for x in primals), 0.3)) < OUTPUT_BOUND[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [72, 128])
def test_views_of_a_packed_buffer(D: int, dtype: torch.dtype) -> None:
    primals = draw((2, 63, 3, 2, D), dtype, 0).unbind(2)
    tangents = draw((1, 63, 3, 2, D), dtype, 1).unbind(2)
    check_forward(attention_forward, list(primals), list(tangents), D**-0.5)
    check_backward(attention_backward, list(primals), D**-0.5)


def test_permuted_and_expanded_strides() -> None:
    dtype = torch.float32
    q = draw((2, 3, 17, 24), dtype, 0).transpose(1, 2)  # heads outside tokens
    k = draw((63, 2, 3, 24), dtype, 1).transpose(0, 1)  # tokens outside the batch
    v = draw((2, 63, 3, 25), dtype, 2)[..., 1:]  # rows of no aligned length: copied
    q_dot = draw((1, 17, 1, 24), dtype, 3).expand(2, 17, 3, 24)
    k_dot = draw((2, 63, 24, 3), dtype, 4).transpose(2, 3)  # the last dimension is not contiguous: copied
    check_forward(attention_forward, [q, k, v], [q_dot, k_dot, None], 0.2)
    check_backward(attention_backward, [q, k, v], 0.2)


def test_strides_of_dimensions_of_one_are_ignored() -> None:
    x = torch.zeros(8).as_strided((1, 1, 1, 8), (1, 3, 5, 1))
    assert row_strides(x=x) == {"stride_x_b": 0, "stride_x_n": 0, "stride_x_h": 0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [(16, 16), (32, 64), (64, 32), (128, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_block_shape(blocks: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    config = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "num_warps": 4, "num_stages": 2}
    primals, tangents = inputs(Case(100, 63, 40), dtype)
    check_forward(attention_forward, primals, tangents, 0.15, causal, config=config)
    check_backward(attention_backward, primals, 0.15, causal, dq_config=config, dkdv_config=config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_eighty(dtype: torch.dtype) -> None:
    primals, tangents = inputs(Case(63, 100, 64, B=1), dtype)
    q, k, v = primals
    scale = scale_for_scores_of_eighty(q, k)
    output_bound = LARGE_SCORE_OUTPUT_BOUND[dtype]
    check_forward(attention_forward, [q, k, v], tangents, scale, bound=output_bound, lse_bound=LARGE_SCORE_LSE_BOUND)
    check_backward(attention_backward, [q, k, v], scale, bound=LARGE_SCORE_GRADIENT_BOUND[dtype])


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("constant", [10, 100, 1000])
def test_large_constant_tangent_scores(constant: int, dtype: torch.dtype) -> None:
    """Measured in float16 for 10, 100 and 1000: 2.8e-4, 2.8e-4, 2.9e-4; uncentred 1.6e-3, 1.6e-2, 1.5e-1."""
    (q, k, v), tangents = inputs(Case(100, 276, 64), dtype)
    k[..., 0], tangents[0][..., 0] = 8, constant
    check_forward(attention_forward, [q, k, v], tangents, 1 / 8)
    uncentred = uncentred_tangent([q, k, v], tangents, 1 / 8)
    assert relative_error(uncentred, tangent_of_oracle([q, k, v], tangents, 1 / 8, False)) > 2 * OUTPUT_BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tangent_scores_of_negligible_first_keys(dtype: torch.dtype) -> None:
    """The first 64 keys have other tangent scores than the rest and no weight: they must not set the centre.

    Measured: float16 2.8e-4 (a centre from the first tile: 1.4e-2); float32 5.0e-6, of the shift by 100 o.
    """
    (q, k, v), tangents = inputs(Case(100, 276, 64), dtype)
    k[:, :64, :, 0], k[:, 64:, :, 0] = 4, -4
    q[..., 0], tangents[0][..., 0] = -8, 100
    check_forward(attention_forward, [q, k, v], tangents, 1 / 8, bound=1e-5 if dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key(dtype: torch.dtype) -> None:
    """With one key o is v, the tangent is v_dot and no gradient reaches q or k."""
    (q, k, v), tangents = inputs(Case(17, 1, 8, B=2, B_t=2), dtype)
    o, o_dot, lse = attention_forward(q, k, v, *tangents, scale=0.5)
    # a GPU's exp2 of a zero that was a fused multiply-add is 1 to the last bits of float32
    torch.testing.assert_close(o, v.expand_as(o), rtol=3 * torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(o_dot, tangents[2].expand_as(o), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    do = draw(tuple(o.shape), dtype, 7)
    dq, dk, dv = attention_backward(do, q, k, v, o, lse, scale=0.5)
    assert dq.abs().max() < 1e-6
    assert dk.abs().max() < 1e-5
    assert relative_error(dv, do.double().sum(1, keepdim=True)) < GRADIENT_BOUND[dtype]


def test_backward_repeats_bit_for_bit() -> None:
    primals, _ = inputs(Case(100, 63, 24, H=4, H_kv=2), torch.float16)
    o, _, lse = attention_forward(*primals, scale=0.3)
    do = draw(tuple(o.shape), o.dtype, 7)
    first, second = (attention_backward(do, *primals, o, lse, scale=0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tf32_on_request() -> None:
    primals, tangents = inputs(Case(17, 63, 64), torch.float32)
    check_forward(
        attention_forward, primals, tangents, 0.125, precision="tf32", bound=2e-3 if DEVICE == "cuda" else None
    )


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_batches_of_more_rows_than_a_grid_has(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inspect.unwrap(attention_forward).__globals__, "MAX_BATCH", 2)
    primals, tangents = inputs(Case(17, 17, 8, B=5, B_t=rows), torch.float32)
    check_forward(attention_forward, primals, tangents, 0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 4])
@pytest.mark.parametrize("apart", [0, 1])
def test_primal_rows_in_a_launch_of_their_own(apart: int, rows: int, dtype: torch.dtype) -> None:
    """Each launch takes its own configuration."""
    primals, tangents = inputs(Case(63, 100, 72, B=4, B_t=rows, H=2, H_kv=2), dtype)
    dual, primal = ({"BLOCK_M": m, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2} for m in (32, 64))
    launches: list[tuple[Launch, object]] = []
    with (
        forced_config("attention_forward_apart", {"LEAST_BLOCKS": apart and 1}),
        forced_config("attention_forward", dual),
        forced_config("attention_forward_primal", primal),
        recorded(launches),
    ):
        check_forward(attention_forward, primals, tangents, 72**-0.5)
    made = [(launch.arguments["o_ptr"].shape[0], launch.config) for launch, _ in launches]
    if apart and 0 < rows < 4:
        assert made == [(rows, dual), (4 - rows, primal)]
    else:
        assert made == [(4, dual if rows else primal)]


def test_primal_rows_are_apart_where_both_launches_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = inspect.unwrap(attention_forward).__globals__
    monkeypatch.setitem(forward, "multiprocessors", lambda device: 132)
    for B, rows, apart in ((256, 64, True), (256, 32, False), (256, 224, False), (256, 0, False), (256, 256, False)):
        q = torch.empty((B, 256, 12, 64), device="meta")
        with forced_config("attention_forward_apart", {"LEAST_BLOCKS": 8}):
            assert forward["runs_primal_rows_apart"](q, rows) == apart
        assert not forward["runs_primal_rows_apart"](q, rows)  # the interpreter's
    found = {
        (arch, head_dim, tokens): find_config(
            "attention_forward_apart", arch, torch.bfloat16, head_dim=head_dim, tokens=tokens
        )["LEAST_BLOCKS"]
        for arch, head_dim, tokens in (("sm_90", 80, 65), ("sm_90", 80, 64), ("sm_90", 88, 256), ("sm_80", 64, 256))
    }
    assert [least > 0 for least in found.values()] == [True, False, False, False]


def test_batches_of_more_rows_than_a_grid_has_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inspect.unwrap(attention_forward).__globals__, "MAX_BATCH", 2)
    primals, tangents = inputs(Case(17, 17, 8, B=6, B_t=3), torch.float32)
    launches: list[tuple[Launch, object]] = []
    with forced_config("attention_forward_apart", {"LEAST_BLOCKS": 1}), recorded(launches):
        check_forward(attention_forward, primals, tangents, 0.3)
    assert [launch.arguments["o_ptr"].shape[0] for launch, _ in launches] == [2, 1, 1, 2]
    assert [launch.arguments["B_t"] for launch, _ in launches] == [2, 1, 0, 0]


@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty_results(empty: str) -> None:
    B, N_q = (0, 17) if empty == "batch" else (2, 0)
    primals, tangents = inputs(Case(N_q, 17, 8, B=B, B_t=B), torch.float32)
    o, o_dot, lse = attention_forward(*primals, *tangents, scale=0.3)
    assert o.shape == o_dot.shape == (B, N_q, 1, 8)
    assert lse.shape == (B, 1, N_q)
    dq, dk, dv = attention_backward(o, *primals, o, lse, scale=0.3)
    assert dq.shape == o.shape
    assert not dk.any()
    assert not dv.any()


def test_tangents_of_different_numbers_of_rows_are_refused() -> None:
    x = torch.zeros(1, 4, 2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="q_dot, k_dot, v_dot"):
        attention_forward(x, x, x, x, x[:0], None, scale=1.0)


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [
        (8, (16, 0)),
        (24, (32, 0)),
        (40, (32, 16)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (104, (128, 0)),
        (136, (128, 16)),
        (192, (128, 64)),
        (200, (256, 0)),
        (256, (256, 0)),
    ],
)
def test_split_of_the_head(head_dim: int, parts: tuple[int, int]) -> None:
    assert split_head_dim(head_dim) == parts
