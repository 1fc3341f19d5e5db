"""Attention's primal backward from (q, k, v, o, lse): two Triton kernels without atomics.

The gradients may be views of one buffer, dqkv [B, N, 3, H, D], of which the kernels also give the sum over the tokens:
the gradient of the bias of the projection that q, k and v come from.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfkernels.launch import Launch, cdiv, launch_config
from mfkernels.plan import planned
from mfkernels.rowwise import sum_partials

from .tiles import (
    as_rows,
    load,
    load_tile,
    long_head,
    rescale,
    row_strides,
    rows_of,
    shape_arguments,
    store,
    visible,
    weigh,
    zeros_like,
)

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def store_sum(ptr, tiles, block, num_blocks, SUM_BLOCKS, stride, D: tl.constexpr):
    """The tiles' sum over their rows, into the sums of this block of tokens.

    There are SUM_BLOCKS of them, `stride` apart: where the other kernel has more blocks, zeros fill the rest.
    """
    for i in tl.static_range(len(tiles)):
        cols = i * tiles[0].shape[1] + tl.arange(0, tiles[i].shape[1])  # [WIDTH]
        total = tl.sum(tiles[i], 0)  # [WIDTH]
        for index in range(block, SUM_BLOCKS, num_blocks):
            tl.store(ptr + index * stride + cols, total, mask=cols < D)
            total = tl.zeros_like(total)  # [WIDTH]


@triton.jit
def load_and_score(q, do, k_rows, v_rows, first, rows, num_rows, D, MASK_ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """Tiles k and v, s = q kᵀ and dp = do vᵀ. A column of tiles at a time: k before v spills on sm_80 at D = 72."""
    s = tl.zeros([q[0].shape[0], rows.shape[0]], tl.float32)
    dp = tl.zeros([q[0].shape[0], rows.shape[0]], tl.float32)
    k = ()
    v = ()
    for i in tl.static_range(len(q)):
        k = k + (load_tile(k_rows, first, rows, num_rows, D, i * q[0].shape[1], q[i].shape[1], MASK_ROWS),)
        v = v + (load_tile(v_rows, first, rows, num_rows, D, i * q[0].shape[1], q[i].shape[1], MASK_ROWS),)
        s = tl.dot(q[i], k[i].T, s, input_precision=PRECISION)
        dp = tl.dot(do[i], v[i].T, dp, input_precision=PRECISION)
    return k, v, s, dp


@triton.jit
def row_dots(x, y):
    """rowsum(x ∘ y) [ROWS] in float32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)  # [ROWS]
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)  # [ROWS]
    return total


@triton.jit
def only_rows(tiles, mask):
    """The rows of the mask [ROWS], zeros in place of the others."""
    kept = ()
    for i in tl.static_range(len(tiles)):
        kept = kept + (tl.where(mask[:, None], tiles[i], 0.0),)
    return kept


@triton.jit
def _dq_kernel(
    do_ptr,  # [B, N_q, H, D]
    q_ptr,  # [B, N_q, H, D]
    k_ptr,  # [B, N_kv, H_kv, D]
    v_ptr,  # [B, N_kv, H_kv, D]
    o_ptr,  # [B, N_q, H, D]
    lse_ptr,  # [B, H, N_q] contiguous
    delta_ptr,  # [B, H, N_q] contiguous, written here
    dq_ptr,  # [B, N_q, H, D], tokens OUT_HEADS · D elements apart
    partials_ptr,  # [B, SUM_BLOCKS, 3, H, D] float32: sums over a block of tokens; or None
    stride_do_b,  # all strides count vectors of ALIGN elements
    stride_do_n,
    stride_do_h,
    stride_q_b,
    stride_q_n,
    stride_q_h,
    stride_k_b,
    stride_k_n,
    stride_k_h,
    stride_v_b,
    stride_v_n,
    stride_v_h,
    stride_o_b,
    stride_o_n,
    stride_o_h,
    scale,
    N_q,
    N_kv,
    H,
    GROUP,
    OUT_HEADS,
    SUM_BLOCKS,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK_N: tl.constexpr,
    LONG_HEAD: tl.constexpr,  # rows of one head lie 2^31 elements apart
    ONE_STRIDE: tl.constexpr,  # k and v have the same
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries against all keys: dq, and delta = rowsum(do o), which the dk, dv kernel reads."""
    num_m = tl.cdiv(N_q, BLOCK_M)
    pid = tl.program_id(0)
    block_m = pid % num_m
    if CAUSAL:
        block_m = num_m - 1 - block_m  # the longest rows start first
    head = ((pid // num_m) % H).to(tl.int64)
    batch = (pid // num_m // H).to(tl.int64)
    head_kv = head // GROUP
    start_m = block_m * BLOCK_M
    row_m = start_m.to(tl.int64)
    left_m = N_q - start_m
    rows_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_m = start_m + rows_m  # [BLOCK_M]
    mask_m = rows_m < left_m  # [BLOCK_M]

    if ONE_STRIDE:
        stride_v_n = stride_k_n
    do_rows = rows_of(do_ptr, batch, head, row_m, stride_do_b, stride_do_n, stride_do_h, ALIGN)
    q_rows = rows_of(q_ptr, batch, head, row_m, stride_q_b, stride_q_n, stride_q_h, ALIGN)
    o_rows = rows_of(o_ptr, batch, head, row_m, stride_o_b, stride_o_n, stride_o_h, ALIGN)
    k_rows = rows_of(k_ptr, batch, head_kv, 0, stride_k_b, stride_k_n, stride_k_h, ALIGN)
    v_rows = rows_of(v_ptr, batch, head_kv, 0, stride_v_b, stride_v_n, stride_v_h, ALIGN)
    offs_row = (batch * H + head) * N_q + row_m
    dq_ptr += ((batch * N_q + row_m) * OUT_HEADS + head) * D

    q = load(q_rows, 0, rows_m, left_m, D, D_MAIN, D_TAIL, True)  # [BLOCK_M, D]
    do = load(do_rows, 0, rows_m, left_m, D, D_MAIN, D_TAIL, True)  # [BLOCK_M, D]
    o = load(o_rows, 0, rows_m, left_m, D, D_MAIN, D_TAIL, True)  # [BLOCK_M, D]
    delta = row_dots(do, o)  # [BLOCK_M]
    dq = zeros_like(q)  # [BLOCK_M, D]
    tl.store(delta_ptr + offs_row + rows_m, delta, mask=mask_m)
    lse_log2 = tl.load(lse_ptr + offs_row + rows_m, mask=mask_m, other=0.0) * LOG2_E  # [BLOCK_M]

    scale_log2 = scale * LOG2_E
    end_n = N_kv
    if CAUSAL:
        end_n = tl.minimum(N_kv, start_m + BLOCK_M)
    for start_n in tl.range(0, end_n, BLOCK_N):
        left_n = N_kv - start_n
        row_n = tl.cast(start_n, tl.int64 if LONG_HEAD else tl.int32)
        k, _, s, dp = load_and_score(q, do, k_rows, v_rows, row_n, rows_n, left_n, D, MASK_N, PRECISION)
        # Absent keys read as zeros, and exp2(0 - lse) can overflow: inf * 0 would reach dq.
        s = visible(s, offs_m, start_n, rows_n, left_n, CAUSAL, MASK_N)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])  # [BLOCK_M, BLOCK_N]
        ds = (p * (dp - delta[:, None])).to(k[0].dtype)  # [BLOCK_M, BLOCK_N]
        dq = weigh(dq, ds, k, PRECISION)  # [BLOCK_M, D]

    dq = rescale(dq, scale)  # [BLOCK_M, D]
    store(dq_ptr, OUT_HEADS * D, rows_m, left_m, dq, D)
    if partials_ptr is not None:
        sum_ptr = partials_ptr + (batch * SUM_BLOCKS * 3 * H + head) * D
        store_sum(sum_ptr, dq, block_m, num_m, SUM_BLOCKS, 3 * H * D, D)


@triton.jit
def _dkdv_kernel(
    do_ptr,  # [B, N_q, H, D]
    q_ptr,  # [B, N_q, H, D]
    k_ptr,  # [B, N_kv, H_kv, D]
    v_ptr,  # [B, N_kv, H_kv, D]
    lse_ptr,  # [B, H, N_q] contiguous
    delta_ptr,  # [B, H, N_q] contiguous
    dk_ptr,  # [B, N_kv, H_kv, D], tokens OUT_HEADS · D elements apart
    dv_ptr,  # [B, N_kv, H_kv, D], the same
    partials_ptr,  # [B, SUM_BLOCKS, 3, H, D] float32: sums over a block of tokens; or None
    stride_do_b,  # all strides count vectors of ALIGN elements
    stride_do_n,
    stride_do_h,
    stride_q_b,
    stride_q_n,
    stride_q_h,
    stride_k_b,
    stride_k_n,
    stride_k_h,
    stride_v_b,
    stride_v_n,
    stride_v_h,
    scale,
    N_q,
    N_kv,
    H,
    GROUP,
    OUT_HEADS,
    SUM_BLOCKS,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK_M: tl.constexpr,
    LONG_HEAD: tl.constexpr,  # rows of one head lie 2^31 elements apart
    ONE_STRIDE: tl.constexpr,  # do and q have the same
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of keys against all queries of all heads that share it. Everything is transposed: keys are the rows."""
    H_kv = H // GROUP
    num_n = tl.cdiv(N_kv, BLOCK_N)
    num_m = tl.cdiv(N_q, BLOCK_M)
    pid = tl.program_id(0)
    start_n = (pid % num_n) * BLOCK_N
    head_kv = ((pid // num_n) % H_kv).to(tl.int64)
    batch = (pid // num_n // H_kv).to(tl.int64)
    row_n = start_n.to(tl.int64)
    left_n = N_kv - start_n
    rows_m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_n = start_n + rows_n  # [BLOCK_N]

    if ONE_STRIDE:
        stride_do_n = stride_q_n
    k_rows = rows_of(k_ptr, batch, head_kv, row_n, stride_k_b, stride_k_n, stride_k_h, ALIGN)
    v_rows = rows_of(v_ptr, batch, head_kv, row_n, stride_v_b, stride_v_n, stride_v_h, ALIGN)
    offs_out = ((batch * N_kv + row_n) * OUT_HEADS + head_kv) * D

    k = load(k_rows, 0, rows_n, left_n, D, D_MAIN, D_TAIL, True)  # [BLOCK_N, D]
    v = load(v_rows, 0, rows_n, left_n, D, D_MAIN, D_TAIL, True)  # [BLOCK_N, D]
    dk = zeros_like(k)  # [BLOCK_N, D]
    dv = zeros_like(v)  # [BLOCK_N, D]

    scale_log2 = scale * LOG2_E
    first_m = 0
    if CAUSAL:
        first_m = start_n // BLOCK_M  # the first block of queries that see a key of this one
    blocks = tl.maximum(num_m - first_m, 0)
    for index in tl.range(0, blocks * GROUP):
        head = head_kv * GROUP + index // blocks
        start_m = (first_m + index % blocks) * BLOCK_M
        row_m = tl.cast(start_m, tl.int64 if LONG_HEAD else tl.int32)
        left_m = N_q - start_m
        do_rows = rows_of(do_ptr, batch, head, row_m, stride_do_b, stride_do_n, stride_do_h, ALIGN)
        q_rows = rows_of(q_ptr, batch, head, row_m, stride_q_b, stride_q_n, stride_q_h, ALIGN)
        offs_row = (batch * H + head) * N_q + row_m

        # Absent queries read as zeros, lse too: p is 1 for them, do and dp - delta are 0, nothing is added.
        q, do, s, dp = load_and_score(k, v, q_rows, do_rows, 0, rows_m, left_m, D, MASK_M, PRECISION)
        lse_log2 = tl.load(lse_ptr + offs_row + rows_m, mask=rows_m < left_m, other=0.0) * LOG2_E  # [BLOCK_M]
        delta = tl.load(delta_ptr + offs_row + rows_m, mask=rows_m < left_m, other=0.0)  # [BLOCK_M]
        if CAUSAL:
            s = tl.where(offs_n[:, None] <= start_m + rows_m[None, :], s, -float("inf"))  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(s * scale_log2 - lse_log2[None, :])  # [BLOCK_N, BLOCK_M]
        dv = weigh(dv, p.to(v[0].dtype), do, PRECISION)  # [BLOCK_N, D]
        ds = (p * (dp - delta[None, :])).to(v[0].dtype)  # [BLOCK_N, BLOCK_M]
        dk = weigh(dk, ds, q, PRECISION)  # [BLOCK_N, D]

    dk = rescale(dk, scale)  # [BLOCK_N, D]
    store(dk_ptr + offs_out, OUT_HEADS * D, rows_n, left_n, dk, D)
    store(dv_ptr + offs_out, OUT_HEADS * D, rows_n, left_n, dv, D)
    if partials_ptr is not None:
        dk_sum_ptr = partials_ptr + ((batch * SUM_BLOCKS * 3 + 1) * H + head_kv) * D
        dv_sum_ptr = dk_sum_ptr + H * D
        block_n = start_n // BLOCK_N
        there = rows_n < left_n  # [BLOCK_N]; absent keys have gradients that nobody reads
        dk, dv = only_rows(dk, there), only_rows(dv, there)
        store_sum(dk_sum_ptr, dk, block_n, num_n, SUM_BLOCKS, 3 * H * D, D)
        store_sum(dv_sum_ptr, dv, block_n, num_n, SUM_BLOCKS, 3 * H * D, D)


def dq_launch(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    partials: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    precision: str,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills delta and dq."""
    B, N_q, H, D = q.shape
    N_kv = k.shape[1]
    config = backward_configs(q, k, precision, config)[0]
    return Launch(
        _dq_kernel,
        lambda config: (cdiv(N_q, config["BLOCK_M"]) * H * B,),
        config,
        q.device,
        do_ptr=do,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        o_ptr=o,
        lse_ptr=lse,
        delta_ptr=delta,
        dq_ptr=dq,
        partials_ptr=partials,
        **row_strides(do=do, q=q, k=k, v=v, o=o),
        scale=scale,
        **shape_arguments(q, k),
        OUT_HEADS=dq.stride(1) // D,
        SUM_BLOCKS=0 if partials is None else partials.shape[1],
        CAUSAL=causal,
        MASK_N=N_kv % config["BLOCK_N"] != 0,
        LONG_HEAD=long_head(k, v),
        ONE_STRIDE=k.stride(1) == v.stride(1),
        PRECISION=precision,
    )


def dkdv_launch(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    partials: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    precision: str,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills dk and dv; delta comes from the launch above."""
    B, N_q, _, D = q.shape
    N_kv, H_kv = k.shape[1:3]
    config = backward_configs(q, k, precision, None, config)[1]
    return Launch(
        _dkdv_kernel,
        lambda config: (cdiv(N_kv, config["BLOCK_N"]) * H_kv * B,),
        config,
        q.device,
        do_ptr=do,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        lse_ptr=lse,
        delta_ptr=delta,
        dk_ptr=dk,
        dv_ptr=dv,
        partials_ptr=partials,
        **row_strides(do=do, q=q, k=k, v=v),
        scale=scale,
        **shape_arguments(q, k),
        OUT_HEADS=dk.stride(1) // D,
        SUM_BLOCKS=0 if partials is None else partials.shape[1],
        CAUSAL=causal,
        MASK_M=N_q % config["BLOCK_M"] != 0,
        LONG_HEAD=long_head(q, do),
        ONE_STRIDE=q.stride(1) == do.stride(1),
        PRECISION=precision,
    )


@planned
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    precision: str = "ieee",
    dq_config: Mapping[str, int] | None = None,
    dkdv_config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the shapes of q, k, v. Every sum has one owner: the same bits at every run."""
    dq = torch.empty(q.shape, device=q.device, dtype=q.dtype)  # [B, N_q, H, D]
    dk = torch.empty(k.shape, device=k.device, dtype=k.dtype)  # [B, N_kv, H_kv, D]
    dv = torch.empty(v.shape, device=v.device, dtype=v.dtype)  # [B, N_kv, H_kv, D]
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    configs = backward_configs(q, k, precision, dq_config, dkdv_config)
    _run(do, q, k, v, o, lse, dq, dk, dv, None, scale=scale, causal=causal, precision=precision, configs=configs)
    return dq, dk, dv


@planned
def packed_backward(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    scale: float,
    precision: str,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """dqkv [B, N, 3, H, D] of qkv without a mask, and with `bias_dtype` its sum over batch and tokens, [3 · H · D]."""
    B, N, _, H, D = qkv.shape
    q, k, v = qkv.unbind(2)  # [B, N, H, D] each
    dqkv = torch.empty(qkv.shape, device=qkv.device, dtype=qkv.dtype)  # [B, N, 3, H, D]
    if dqkv.numel() == 0:
        return dqkv, None if bias_dtype is None else torch.zeros(3 * H * D, device=qkv.device, dtype=bias_dtype)
    configs, partials = backward_configs(q, k, precision, packed=bias_dtype is not None), None
    if bias_dtype is not None:
        blocks = max(cdiv(N, configs[0]["BLOCK_M"]), cdiv(N, configs[1]["BLOCK_N"]))
        # [B, blocks, 3, H, D]
        partials = torch.empty((B, blocks, 3, H, D), device=qkv.device, dtype=torch.float32)
    dq, dk, dv = dqkv.unbind(2)  # [B, N, H, D] each
    _run(do, q, k, v, o, lse, dq, dk, dv, partials, scale=scale, causal=False, precision=precision, configs=configs)
    if partials is None or bias_dtype is None:
        return dqkv, None
    return dqkv, sum_partials(partials.view(1, -1, 3 * H * D), bias_dtype).view(-1)


def backward_configs(
    q: Tensor,
    k: Tensor,
    precision: str,
    dq_config: Mapping[str, int] | None = None,
    dkdv_config: Mapping[str, int] | None = None,
    *,
    packed: bool = False,
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Of the dq and of the dk, dv kernel: what is given, else the table's. With sums for a bias they are `packed`."""

    def of(op: str, tokens: int) -> Mapping[str, int]:
        sizes = {"head_dim": q.shape[3], "tokens": tokens, "packed": int(packed)}
        return launch_config(op, q.device, q.dtype, precision=precision, **sizes)

    return (
        dq_config or of("attention_backward_dq", k.shape[1]),
        dkdv_config or of("attention_backward_dkdv", q.shape[1]),
    )


def _run(do, q, k, v, o, lse, dq, dk, dv, partials, *, configs, **options):
    do, q, k, v, o = (as_rows(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()  # [B, H, N_q]
    delta = torch.empty_like(lse)  # [B, H, N_q]
    dq_launch(do, q, k, v, o, lse, delta, dq, partials, **options, config=configs[0]).run()
    dkdv_launch(do, q, k, v, lse, delta, dk, dv, partials, **options, config=configs[1]).run()
