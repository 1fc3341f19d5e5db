"""Triton attention, forward: output, tangent and log-sum-exp in one sweep over the keys (README.md derives it)."""

# mypy: allow-untyped-defs

import itertools
import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfkernels.launch import Launch, cdiv, launch_config, multiprocessors, next_power_of_2
from mfkernels.plan import planned

from .limits import unsupported

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
MAX_BATCH = 65535  # of one launch: the third axis of a grid


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Widths (main, tail) of the two power-of-two column blocks that hold a head; tail is 0 where one is no wider.

    72 is 64 + 16, not 128: 1.35x the tensor time of 64 against 2x. 16 is the least a tensor core takes.
    """
    whole = max(16, next_power_of_2(head_dim))
    main = whole // 2
    if head_dim <= 16 or head_dim == whole:
        return whole, 0
    tail = max(16, next_power_of_2(head_dim - main))
    return (main, tail) if main + tail < whole else (whole, 0)


@triton.jit
def load_tile(
    ptr,
    stride,
    rows,
    num_rows,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Columns FIRST .. FIRST + WIDTH of the rows at ptr; what lies past num_rows or past D reads as zero."""
    cols = FIRST + tl.arange(0, WIDTH)  # [WIDTH]
    ptrs = ptr + (rows[:, None] * stride + cols[None, :])  # [ROWS, WIDTH]
    if MASK_ROWS:
        if FIRST + WIDTH > D:
            return tl.load(ptrs, mask=(rows[:, None] < num_rows) & (cols[None, :] < D), other=0.0)
        else:
            return tl.load(ptrs, mask=rows[:, None] < num_rows, other=0.0)
    else:
        if FIRST + WIDTH > D:
            return tl.load(ptrs, mask=cols[None, :] < D, other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit
def store_tile(
    ptr,
    stride,
    rows,
    num_rows,
    tile,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    cols = FIRST + tl.arange(0, WIDTH)  # [WIDTH]
    mask = rows[:, None] < num_rows  # [ROWS, 1]
    if FIRST + WIDTH > D:
        mask = mask & (cols[None, :] < D)  # [ROWS, WIDTH]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sweep(
    q_ptr,
    k_ptr,
    v_ptr,
    q_dot_ptr,
    k_dot_ptr,
    v_dot_ptr,
    o_ptr,
    o_dot_ptr,
    lse_ptr,
    stride_q_n,
    stride_k_n,
    stride_v_n,
    stride_q_dot_n,
    stride_k_dot_n,
    stride_v_dot_n,
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
    DUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head against all its keys. Inputs point at the head, q at the block."""
    HAS_Q_DOT: tl.constexpr = DUAL and q_dot_ptr is not None
    HAS_K_DOT: tl.constexpr = DUAL and k_dot_ptr is not None
    HAS_V_DOT: tl.constexpr = DUAL and v_dot_ptr is not None
    HAS_S_DOT: tl.constexpr = HAS_Q_DOT or HAS_K_DOT

    rows_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    left_m = N_q - start_m
    offs_m = start_m + rows_m  # [BLOCK_M]

    q = load_tile(q_ptr, stride_q_n, rows_m, left_m, D, 0, D_MAIN, True)  # [BLOCK_M, D_MAIN]
    if D_TAIL > 0:
        q_tail = load_tile(q_ptr, stride_q_n, rows_m, left_m, D, D_MAIN, D_TAIL, True)  # [BLOCK_M, D_TAIL]
    if HAS_Q_DOT:
        q_dot = load_tile(q_dot_ptr, stride_q_dot_n, rows_m, left_m, D, 0, D_MAIN, True)  # [BLOCK_M, D_MAIN]
        if D_TAIL > 0:
            q_dot_tail = load_tile(q_dot_ptr, stride_q_dot_n, rows_m, left_m, D, D_MAIN, D_TAIL, True)

    m = tl.full([BLOCK_M], -float("inf"), tl.float32)  # [BLOCK_M] row maximum, in log2 units
    l = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M] sum of p  # noqa: E741
    c = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M] the centre: mean of s_dot under p so far
    o = tl.zeros([BLOCK_M, D_MAIN], tl.float32)  # [BLOCK_M, D_MAIN]
    t = tl.zeros([BLOCK_M, D_MAIN], tl.float32)  # [BLOCK_M, D_MAIN]
    if D_TAIL > 0:
        o_tail = tl.zeros([BLOCK_M, D_TAIL], tl.float32)  # [BLOCK_M, D_TAIL]
        t_tail = tl.zeros([BLOCK_M, D_TAIL], tl.float32)  # [BLOCK_M, D_TAIL]

    end_n = N_kv
    if CAUSAL:
        end_n = tl.minimum(N_kv, start_m + BLOCK_M)
    for start_n in tl.range(0, end_n, BLOCK_N):
        left_n = N_kv - start_n
        row_n = tl.cast(start_n, tl.int64 if LONG_HEAD else tl.int32)
        k = load_tile(k_ptr + row_n * stride_k_n, stride_k_n, rows_n, left_n, D, 0, D_MAIN, MASK_N)  # [BLOCK_N, D_MAIN]
        s = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if D_TAIL > 0:
            k_tail = load_tile(k_ptr + row_n * stride_k_n, stride_k_n, rows_n, left_n, D, D_MAIN, D_TAIL, MASK_N)
            s = tl.dot(q_tail, k_tail.T, s, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASK_N:
            s = tl.where(rows_n[None, :] < left_n, s, -float("inf"))  # [BLOCK_M, BLOCK_N]
        if CAUSAL:
            s = tl.where(start_n + rows_n[None, :] <= offs_m[:, None], s, -float("inf"))  # [BLOCK_M, BLOCK_N]

        if HAS_S_DOT:
            s_dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
            if HAS_Q_DOT:
                s_dot = tl.dot(q_dot, k.T, s_dot, input_precision=PRECISION)
                if D_TAIL > 0:
                    s_dot = tl.dot(q_dot_tail, k_tail.T, s_dot, input_precision=PRECISION)
            if HAS_K_DOT:
                k_dot_row = k_dot_ptr + row_n * stride_k_dot_n
                k_dot = load_tile(k_dot_row, stride_k_dot_n, rows_n, left_n, D, 0, D_MAIN, MASK_N)
                s_dot = tl.dot(q, k_dot.T, s_dot, input_precision=PRECISION)
                if D_TAIL > 0:
                    k_dot_tail = load_tile(k_dot_row, stride_k_dot_n, rows_n, left_n, D, D_MAIN, D_TAIL, MASK_N)
                    s_dot = tl.dot(q_tail, k_dot_tail.T, s_dot, input_precision=PRECISION)

        # Key 0 is visible to every query, so m is finite from the first tile on and no exponent is inf - inf.
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)  # [BLOCK_M]
        alpha = tl.exp2(m - m_new)  # [BLOCK_M]
        p = tl.exp2(s * scale_log2 - m_new[:, None])  # [BLOCK_M, BLOCK_N]
        p_low = p.to(q.dtype)  # [BLOCK_M, BLOCK_N]
        m = m_new
        l_old = l * alpha  # [BLOCK_M]
        l = l_old + tl.sum(p, 1)  # [BLOCK_M]  # noqa: E741

        # t is relative to c. Moving c to the mean over the keys seen so far, this tile included, moves t by so much o.
        if HAS_S_DOT:
            c_new = (c * l_old + tl.sum(p * s_dot, 1) * scale) / l  # [BLOCK_M]
            shift = (c_new - c) * alpha  # [BLOCK_M]
            c = c_new
            h_low = (p * (s_dot * scale - c[:, None])).to(q.dtype)  # [BLOCK_M, BLOCK_N]
            t = t * alpha[:, None] - shift[:, None] * o  # [BLOCK_M, D_MAIN]
            if D_TAIL > 0:
                t_tail = t_tail * alpha[:, None] - shift[:, None] * o_tail  # [BLOCK_M, D_TAIL]
        elif DUAL:
            t = t * alpha[:, None]  # [BLOCK_M, D_MAIN]
            if D_TAIL > 0:
                t_tail = t_tail * alpha[:, None]  # [BLOCK_M, D_TAIL]

        v = load_tile(v_ptr + row_n * stride_v_n, stride_v_n, rows_n, left_n, D, 0, D_MAIN, MASK_N)  # [BLOCK_N, D_MAIN]
        o = tl.dot(p_low, v, o * alpha[:, None], input_precision=PRECISION)  # [BLOCK_M, D_MAIN]
        if D_TAIL > 0:
            v_tail = load_tile(v_ptr + row_n * stride_v_n, stride_v_n, rows_n, left_n, D, D_MAIN, D_TAIL, MASK_N)
            o_tail = tl.dot(p_low, v_tail, o_tail * alpha[:, None], input_precision=PRECISION)  # [BLOCK_M, D_TAIL]
        if HAS_V_DOT:
            v_dot_row = v_dot_ptr + row_n * stride_v_dot_n
            v_dot = load_tile(v_dot_row, stride_v_dot_n, rows_n, left_n, D, 0, D_MAIN, MASK_N)
            t = tl.dot(p_low, v_dot, t, input_precision=PRECISION)  # [BLOCK_M, D_MAIN]
            if D_TAIL > 0:
                v_dot_tail = load_tile(v_dot_row, stride_v_dot_n, rows_n, left_n, D, D_MAIN, D_TAIL, MASK_N)
                t_tail = tl.dot(p_low, v_dot_tail, t_tail, input_precision=PRECISION)  # [BLOCK_M, D_TAIL]
        if HAS_S_DOT:
            t = tl.dot(h_low, v, t, input_precision=PRECISION)  # [BLOCK_M, D_MAIN]
            if D_TAIL > 0:
                t_tail = tl.dot(h_low, v_tail, t_tail, input_precision=PRECISION)  # [BLOCK_M, D_TAIL]

    # The addresses are worked out only now: across the loop they would cost D = 128 the registers it lacks.
    inv_l = 1.0 / l  # [BLOCK_M]
    row_m = start_m.to(tl.int64)
    stride_o_n = H * D
    offs_o = ((batch * N_q + row_m) * H + head) * D
    o_ptr += offs_o
    tl.store(lse_ptr + (batch * H + head) * N_q + row_m + rows_m, m * LN_2 + tl.log(l), mask=rows_m < left_m)
    store_tile(o_ptr, stride_o_n, rows_m, left_m, o * inv_l[:, None], D, 0, D_MAIN)
    if D_TAIL > 0:
        store_tile(o_ptr, stride_o_n, rows_m, left_m, o_tail * inv_l[:, None], D, D_MAIN, D_TAIL)
    if DUAL:
        o_dot_ptr += offs_o
        # c is now the mean over all keys, mu of README.md, so nothing is left to subtract.
        store_tile(o_dot_ptr, stride_o_n, rows_m, left_m, t * inv_l[:, None], D, 0, D_MAIN)
        if D_TAIL > 0:
            store_tile(o_dot_ptr, stride_o_n, rows_m, left_m, t_tail * inv_l[:, None], D, D_MAIN, D_TAIL)


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

    stride_q_n = stride_q_n * ALIGN
    stride_k_n = stride_k_n * ALIGN
    stride_v_n = stride_v_n * ALIGN
    stride_q_dot_n = stride_q_dot_n * ALIGN
    stride_k_dot_n = stride_k_dot_n * ALIGN
    stride_v_dot_n = stride_v_dot_n * ALIGN
    if ONE_STRIDE:
        stride_v_n = stride_k_n
        stride_k_dot_n = stride_k_n
        stride_v_dot_n = stride_k_n
    q_ptr += (batch * stride_q_b + head * stride_q_h) * ALIGN + row_m * stride_q_n
    k_ptr += (batch * stride_k_b + head_kv * stride_k_h) * ALIGN
    v_ptr += (batch * stride_v_b + head_kv * stride_v_h) * ALIGN
    if q_dot_ptr is not None:
        q_dot_ptr += (batch * stride_q_dot_b + head * stride_q_dot_h) * ALIGN + row_m * stride_q_dot_n
    if k_dot_ptr is not None:
        k_dot_ptr += (batch * stride_k_dot_b + head_kv * stride_k_dot_h) * ALIGN
    if v_dot_ptr is not None:
        v_dot_ptr += (batch * stride_v_dot_b + head_kv * stride_v_dot_h) * ALIGN

    # Both calls are inlined: a batch row without a tangent runs the primal loop, a third of the matmuls.
    if HAS_TANGENT and batch < B_t:
        _sweep(
            q_ptr=q_ptr,
            k_ptr=k_ptr,
            v_ptr=v_ptr,
            q_dot_ptr=q_dot_ptr,
            k_dot_ptr=k_dot_ptr,
            v_dot_ptr=v_dot_ptr,
            o_ptr=o_ptr,
            o_dot_ptr=o_dot_ptr,
            lse_ptr=lse_ptr,
            stride_q_n=stride_q_n,
            stride_k_n=stride_k_n,
            stride_v_n=stride_v_n,
            stride_q_dot_n=stride_q_dot_n,
            stride_k_dot_n=stride_k_dot_n,
            stride_v_dot_n=stride_v_dot_n,
            scale=scale,
            scale_log2=scale_log2,
            batch=batch,
            head=head,
            start_m=start_m,
            N_q=N_q,
            N_kv=N_kv,
            H=H,
            D=D,
            D_MAIN=D_MAIN,
            D_TAIL=D_TAIL,
            CAUSAL=CAUSAL,
            MASK_N=MASK_N,
            LONG_HEAD=LONG_HEAD,
            DUAL=True,
            PRECISION=PRECISION,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
        )
    else:
        _sweep(
            q_ptr=q_ptr,
            k_ptr=k_ptr,
            v_ptr=v_ptr,
            q_dot_ptr=None,
            k_dot_ptr=None,
            v_dot_ptr=None,
            o_ptr=o_ptr,
            o_dot_ptr=None,
            lse_ptr=lse_ptr,
            stride_q_n=stride_q_n,
            stride_k_n=stride_k_n,
            stride_v_n=stride_v_n,
            stride_q_dot_n=0,
            stride_k_dot_n=0,
            stride_v_dot_n=0,
            scale=scale,
            scale_log2=scale_log2,
            batch=batch,
            head=head,
            start_m=start_m,
            N_q=N_q,
            N_kv=N_kv,
            H=H,
            D=D,
            D_MAIN=D_MAIN,
            D_TAIL=D_TAIL,
            CAUSAL=CAUSAL,
            MASK_N=MASK_N,
            LONG_HEAD=LONG_HEAD,
            DUAL=False,
            PRECISION=PRECISION,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
        )


def require_supported(q: Tensor, k: Tensor, scale: float) -> None:
    reason = unsupported(q, k, scale)
    if reason is not None:
        raise ValueError(reason)


def vector_width(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def as_rows(x: Tensor) -> Tensor:
    """x itself where its rows load 16 bytes at a time and a block of them spans 32 bits, else a contiguous copy."""
    width = vector_width(x.dtype)
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    aligned = x.storage_offset() % width == 0 and all(stride % width == 0 for stride in strides)
    if x.stride(-1) == 1 and aligned and x.stride(1) < 2**23:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def row_strides(**tensors: Tensor | None) -> dict[str, int]:
    """`stride_<name>_b`, `_n` and `_h`: of batch, token and head, in 16-byte vectors, so that D = 72 stays aligned.

    Of an argument Triton knows at most that 16 divides it, and `tl.multiple_of` adds nothing there (3.6): with plain
    strides D = 72 loads 2 bytes at a time. A dimension of one has no stride (torch leaves any number there), and None
    has none either.
    """
    strides = {}
    for name, x in tensors.items():
        for i, axis in enumerate("bnh"):
            stride = x.stride(i) // vector_width(x.dtype) if x is not None and x.shape[i] > 1 else 0
            strides[f"stride_{name}_{axis}"] = stride
    return strides


def shape_arguments(q: Tensor, k: Tensor) -> dict[str, int]:
    """The sizes that every kernel here takes."""
    D_MAIN, D_TAIL = split_head_dim(q.shape[3])
    return {
        "N_q": q.shape[1],
        "N_kv": k.shape[1],
        "H": q.shape[2],
        "GROUP": q.shape[2] // k.shape[2],
        "D": q.shape[3],
        "D_MAIN": D_MAIN,
        "D_TAIL": D_TAIL,
        "ALIGN": vector_width(q.dtype),
    }


def long_head(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.shape[1] * x.stride(1) >= 2**31 for x in tensors)


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
    return Launch.of(
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
    `precision` is that of float32 products, "ieee" or "tf32". `config` overrides the table.
    """
    require_supported(q, k, scale)
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
