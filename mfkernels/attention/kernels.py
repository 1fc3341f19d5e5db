"""Triton attention, forward: output, tangent and log-sum-exp in one sweep over the keys (README.md derives it)."""

# mypy: allow-untyped-defs, disable-error-code="assignment"

import itertools
import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfkernels.launch import Launch, cdiv, launch_config, multiprocessors
from mfkernels.plan import planned

from .tiles import (
    as_rows,
    load,
    long_head,
    rescale,
    row_strides,
    rows_of,
    score,
    shape_arguments,
    store,
    visible,
    weigh,
    zeros_like,
)

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
MAX_BATCH = 65535  # of one launch: the third axis of a grid


@triton.jit
def softmax(s, m, l, scale_log2, DTYPE: tl.constexpr):  # noqa: E741
    """p of a tile's scores, the rows' maximum m and sum l with it, l without it, and exp2 of how far m moved."""
    # Key 0 is visible to every query, so m is finite from the first tile on and no exponent is inf - inf.
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)  # [BLOCK_M]
    alpha = tl.exp2(m - m_new)  # [BLOCK_M]
    p = tl.exp2(s * scale_log2 - m_new[:, None])  # [BLOCK_M, BLOCK_N]
    p_low = p.to(DTYPE)  # [BLOCK_M, BLOCK_N]
    l_old = l * alpha  # [BLOCK_M]
    return p, p_low, m_new, l_old + tl.sum(p, 1), l_old, alpha


@triton.jit
def centre(p, s_dot, o, t, c, l, l_old, alpha, scale, DTYPE: tl.constexpr):  # noqa: E741
    """h = p (s_dot - c), with c the mean of s_dot under p over the keys seen so far, and t relative to that c.

    Moving c moves t, which has been rescaled, by so much o, which has not.
    """
    c_new = (c * l_old + tl.sum(p * s_dot, 1) * scale) / l  # [BLOCK_M]
    shift = (c_new - c) * alpha  # [BLOCK_M]
    h = (p * (s_dot * scale - c_new[:, None])).to(DTYPE)  # [BLOCK_M, BLOCK_N]
    moved = ()
    for i in tl.static_range(len(t)):
        moved = moved + (t[i] * alpha[:, None] - shift[:, None] * o[i],)
    return h, moved, c_new


@triton.jit
def sweep(
    primals,  # q, k, v of the head: (pointer, stride) each
    tangents,  # q_dot, k_dot, v_dot likewise, () where zero; or () for a batch row without a tangent
    o_ptr,
    o_dot_ptr,
    lse_ptr,
    scale,
    scale_log2,
    batch,
    head,
    start_m,
    N_q,
    N_kv,
    H,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK_N: tl.constexpr,
    LONG_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head against all its keys."""
    DUAL: tl.constexpr = len(tangents) > 0
    HAS_Q_DOT: tl.constexpr = DUAL and len(tangents[0]) > 0
    HAS_K_DOT: tl.constexpr = DUAL and len(tangents[1]) > 0
    HAS_V_DOT: tl.constexpr = DUAL and len(tangents[2]) > 0
    HAS_S_DOT: tl.constexpr = HAS_Q_DOT or HAS_K_DOT

    rows_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    left_m = N_q - start_m
    offs_m = start_m + rows_m  # [BLOCK_M]

    q = load(primals[0], 0, rows_m, left_m, D, D_MAIN, D_TAIL, True)  # [BLOCK_M, D]
    if HAS_Q_DOT:
        q_dot = load(tangents[0], 0, rows_m, left_m, D, D_MAIN, D_TAIL, True)  # [BLOCK_M, D]
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)  # [BLOCK_M] row maximum, in log2 units
    l = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M] sum of p  # noqa: E741
    c = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M] the centre: mean of s_dot under p so far
    o = zeros_like(q)  # [BLOCK_M, D]
    t = zeros_like(q)  # [BLOCK_M, D]

    end_n = N_kv
    if CAUSAL:
        end_n = tl.minimum(N_kv, start_m + BLOCK_M)
    for start_n in tl.range(0, end_n, BLOCK_N):
        left_n = N_kv - start_n
        row_n = tl.cast(start_n, tl.int64 if LONG_HEAD else tl.int32)
        k = load(primals[1], row_n, rows_n, left_n, D, D_MAIN, D_TAIL, MASK_N)  # [BLOCK_N, D]
        s = score(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
        s = visible(s, offs_m, start_n, rows_n, left_n, CAUSAL, MASK_N)  # [BLOCK_M, BLOCK_N]
        if HAS_S_DOT:
            s_dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
            if HAS_Q_DOT:
                s_dot = score(s_dot, q_dot, k, PRECISION)
            if HAS_K_DOT:
                k_dot = load(tangents[1], row_n, rows_n, left_n, D, D_MAIN, D_TAIL, MASK_N)  # [BLOCK_N, D]
                s_dot = score(s_dot, q, k_dot, PRECISION)

        p, p_low, m, l, l_old, alpha = softmax(s, m, l, scale_log2, q[0].dtype)  # noqa: E741
        if HAS_S_DOT:
            h, t, c = centre(p, s_dot, o, t, c, l, l_old, alpha, scale, q[0].dtype)
        elif DUAL:
            t = rescale(t, alpha[:, None])  # [BLOCK_M, D]

        v = load(primals[2], row_n, rows_n, left_n, D, D_MAIN, D_TAIL, MASK_N)  # [BLOCK_N, D]
        o = weigh(rescale(o, alpha[:, None]), p_low, v, PRECISION)  # [BLOCK_M, D]
        if HAS_V_DOT:
            v_dot = load(tangents[2], row_n, rows_n, left_n, D, D_MAIN, D_TAIL, MASK_N)  # [BLOCK_N, D]
            t = weigh(t, p_low, v_dot, PRECISION)  # [BLOCK_M, D]
        if HAS_S_DOT:
            t = weigh(t, h, v, PRECISION)  # [BLOCK_M, D]

    # The addresses are worked out only now: across the loop they would cost D = 128 the registers it lacks.
    inv_l = 1.0 / l  # [BLOCK_M]
    row_m = start_m.to(tl.int64)
    stride_o_n = H * D
    offs_o = ((batch * N_q + row_m) * H + head) * D
    o_ptr += offs_o
    tl.store(lse_ptr + (batch * H + head) * N_q + row_m + rows_m, m * LN_2 + tl.log(l), mask=rows_m < left_m)
    store(o_ptr, stride_o_n, rows_m, left_m, rescale(o, inv_l[:, None]), D)
    if DUAL:
        # c is now the mean over all keys, mu of README.md, so nothing is left to subtract.
        store(o_dot_ptr + offs_o, stride_o_n, rows_m, left_m, rescale(t, inv_l[:, None]), D)


@triton.jit
def _attention_forward_kernel(
    q_ptr,  # [B, N_q, H, D]
    k_ptr,  # [B, N_kv, H_kv, D]
    v_ptr,  # [B, N_kv, H_kv, D]
    q_dot_ptr,  # [B_t, N_q, H, D] or None
    k_dot_ptr,  # [B_t, N_kv, H_kv, D] or None
    v_dot_ptr,  # [B_t, N_kv, H_kv, D] or None
    o_ptr,  # [B, N_q, H, D] contiguous
    o_dot_ptr,  # [B_t, N_q, H, D] contiguous, or None
    lse_ptr,  # [B, H, N_q] contiguous
    stride_q_b,  # all strides count vectors of ALIGN elements
    stride_q_n,
    stride_q_h,
    stride_k_b,
    stride_k_n,
    stride_k_h,
    stride_v_b,
    stride_v_n,
    stride_v_h,
    stride_q_dot_b,
    stride_q_dot_n,
    stride_q_dot_h,
    stride_k_dot_b,
    stride_k_dot_n,
    stride_k_dot_h,
    stride_v_dot_b,
    stride_v_dot_n,
    stride_v_dot_h,
    scale,
    scale_log2,  # scale / ln 2
    B_t,
    N_q,
    N_kv,
    H,
    GROUP,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK_N: tl.constexpr,
    LONG_HEAD: tl.constexpr,  # rows of one head lie 2^31 elements apart: 7 registers more
    ONE_STRIDE: tl.constexpr,  # k, v and their tangents have the same: their addresses share registers
    HAS_TANGENT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A grid of three axes, not one that is divided up: what is read again after the loop costs no register across it.
    block_m = tl.program_id(0)
    if CAUSAL:
        block_m = tl.num_programs(0) - 1 - block_m  # the longest rows start first
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start_m = block_m * BLOCK_M
    row_m = start_m.to(tl.int64)
    head_kv = head // GROUP

    if ONE_STRIDE:
        stride_v_n = stride_k_n
        stride_k_dot_n = stride_k_n
        stride_v_dot_n = stride_k_n
    q = rows_of(q_ptr, batch, head, row_m, stride_q_b, stride_q_n, stride_q_h, ALIGN)
    k = rows_of(k_ptr, batch, head_kv, 0, stride_k_b, stride_k_n, stride_k_h, ALIGN)
    v = rows_of(v_ptr, batch, head_kv, 0, stride_v_b, stride_v_n, stride_v_h, ALIGN)
    q_dot = rows_of(q_dot_ptr, batch, head, row_m, stride_q_dot_b, stride_q_dot_n, stride_q_dot_h, ALIGN)
    k_dot = rows_of(k_dot_ptr, batch, head_kv, 0, stride_k_dot_b, stride_k_dot_n, stride_k_dot_h, ALIGN)
    v_dot = rows_of(v_dot_ptr, batch, head_kv, 0, stride_v_dot_b, stride_v_dot_n, stride_v_dot_h, ALIGN)

    # Both calls are inlined: a batch row without a tangent runs the primal loop, a third of the matmuls.
    if HAS_TANGENT and batch < B_t:
        sweep(
            (q, k, v),
            (q_dot, k_dot, v_dot),
            o_ptr,
            o_dot_ptr,
            lse_ptr,
            scale,
            scale_log2,
            batch,
            head,
            start_m,
            N_q,
            N_kv,
            H,
            D,
            D_MAIN,
            D_TAIL,
            CAUSAL,
            MASK_N,
            LONG_HEAD,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        sweep(
            (q, k, v),
            (),
            o_ptr,
            None,
            lse_ptr,
            scale,
            scale_log2,
            batch,
            head,
            start_m,
            N_q,
            N_kv,
            H,
            D,
            D_MAIN,
            D_TAIL,
            CAUSAL,
            MASK_N,
            LONG_HEAD,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
        )


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    o: Tensor,
    o_dot: Tensor | None,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    precision: str,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills o, o_dot and lse; inputs as `as_rows` leaves them."""
    B, N_q, H, D = q.shape
    N_kv = k.shape[1]
    B_t = 0 if o_dot is None else o_dot.shape[0]
    if config is None:
        config = launch_config(
            "attention_forward" if B_t else "attention_forward_primal",
            q.device,
            q.dtype,
            precision=precision,
            head_dim=D,
            tokens=N_kv,
        )
    return Launch(
        _attention_forward_kernel,
        lambda config: (cdiv(N_q, config["BLOCK_M"]), H, B),
        config,
        q.device,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        q_dot_ptr=q_dot,
        k_dot_ptr=k_dot,
        v_dot_ptr=v_dot,
        o_ptr=o,
        o_dot_ptr=o_dot,
        lse_ptr=lse,
        **row_strides(q=q, k=k, v=v, q_dot=q_dot, k_dot=k_dot, v_dot=v_dot),
        scale=scale,
        scale_log2=scale / math.log(2),
        B_t=B_t,
        **shape_arguments(q, k),
        CAUSAL=causal,
        MASK_N=N_kv % config["BLOCK_N"] != 0,
        LONG_HEAD=long_head(k, v, k_dot, v_dot),
        ONE_STRIDE=len({x.stride(1) for x in (k, v, k_dot, v_dot) if x is not None}) == 1,
        HAS_TANGENT=B_t > 0,
        PRECISION=precision,
    )


def runs_primal_rows_apart(q: Tensor, B_t: int) -> bool:
    """Whether the rows without a tangent get a launch of their own, in the configuration of the primal forward.

    In one launch they take the registers and shared memory of the rows with a tangent, which on some architectures let
    half as many blocks onto a multiprocessor. The table says how many blocks of 128 queries a multiprocessor must get
    from each launch, so that the end of the first, where some have nothing to do, weighs little; 0 for one launch.
    """
    B, N_q, H, D = q.shape
    least = launch_config("attention_forward_apart", q.device, q.dtype, head_dim=D, tokens=N_q)["LEAST_BLOCKS"]
    return least > 0 and min(B_t, B - B_t) * H * cdiv(N_q, 128) >= max(1, least * multiprocessors(q.device))


@planned
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None = None,
    k_dot: Tensor | None = None,
    v_dot: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    precision: str = "ieee",
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """o [B, N_q, H, d], its tangent [B_t, N_q, H, d] (None without tangents) and lse [B, H, N_q], natural log.

    q is [B, N_q, H, d]; k and v [B, N_kv, H_kv, d]; each tangent is None (zero) or has the first B_t <= B batch rows.
    `precision` is that of float32 products, "ieee" or "tf32". `config` overrides the table. Shapes and dtypes are not
    checked here: the router does, by `unsupported` in op.py; scale is positive. Others give wrong numbers, no error.
    """
    B, N_q, H, D = q.shape
    tangent_rows = {x.shape[0] for x in (q_dot, k_dot, v_dot) if x is not None}
    if len(tangent_rows) > 1:
        raise ValueError(f"q_dot, k_dot, v_dot: expected the same number of batch rows, got {sorted(tangent_rows)}")
    o = torch.empty((B, N_q, H, D), device=q.device, dtype=q.dtype)  # [B, N_q, H, D]
    lse = torch.empty((B, H, N_q), device=q.device, dtype=torch.float32)  # [B, H, N_q]
    o_dot, B_t = None, 0
    if tangent_rows:
        B_t = tangent_rows.pop()
        o_dot = torch.empty((B_t, N_q, H, D), device=q.device, dtype=q.dtype)  # [B_t, N_q, H, D]
    if o.numel() == 0:
        return o, o_dot, lse
    q, k, v = as_rows(q), as_rows(k), as_rows(v)
    q_dot, k_dot, v_dot = (None if x is None else as_rows(x) for x in (q_dot, k_dot, v_dot))
    starts = {*range(0, B, MAX_BATCH), B}
    if config is None and runs_primal_rows_apart(q, B_t):
        starts.add(B_t)
    for first, last in itertools.pairwise(sorted(starts)):
        batch = slice(first, last)
        dual = B_t > first
        launch = forward_launch(
            q[batch],
            k[batch],
            v[batch],
            q_dot[batch] if dual and q_dot is not None else None,
            k_dot[batch] if dual and k_dot is not None else None,
            v_dot[batch] if dual and v_dot is not None else None,
            o[batch],
            o_dot[batch] if dual and o_dot is not None else None,
            lse[batch],
            scale=scale,
            causal=causal,
            precision=precision,
            config=config,
        )
        launch.run()
    return o, o_dot, lse
