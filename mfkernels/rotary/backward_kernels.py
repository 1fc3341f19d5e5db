"""Triton backward of `qk_norm_rotary`: turn back, then the backward of the norm; weight gradients by partial sums."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Launch, launch_config
from ..plan import planned
from ..rowwise import sum_partials
from .kernels import (
    as_heads,
    block_of_half,
    blocks_of,
    load_angles,
    load_pairs,
    load_row_pairs,
    pair_columns,
    store_pairs,
    strides_of,
    sum_pairs,
)


@triton.jit
def store_row_pairs(ptr, x1, x2, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    first, second = pair_columns(HALF, BLOCK_HALF, INTERLEAVED)
    mask = tl.arange(0, BLOCK_HALF) < HALF  # [BLOCK_HALF]
    tl.store(ptr + first, x1, mask=mask)
    tl.store(ptr + second, x2, mask=mask)


@triton.jit
def _norm_backward_rows(
    dy_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    partials_ptr,
    eps,
    total,
    blocks,
    N,
    H: tl.constexpr,
    STRIDE_B,
    STRIDE_N: tl.constexpr,
    STRIDE_H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Every PARTS-th block of heads of queries or of keys, and this program's share of the weight's gradient."""
    w1, w2 = load_row_pairs(weight_ptr, HALF, BLOCK_HALF, INTERLEAVED)  # [1, BLOCK_HALF]
    dw1 = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)  # [BLOCK_R, BLOCK_HALF]
    dw2 = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)  # [BLOCK_R, BLOCK_HALF]
    for block in range(tl.program_id(0), total, PARTS):
        b = tl.cast(block // blocks, tl.int64)
        heads = (block % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R] of the N·H of a sample
        mask = heads < N * H  # [BLOCK_R]
        n, h = heads // H, heads % H  # [BLOCK_R]
        offs = (b * N * H + heads) * (2 * HALF)  # [BLOCK_R]
        x_ptrs = x_ptr + (b * STRIDE_B + n.to(tl.int64) * STRIDE_N + h * STRIDE_H)  # [BLOCK_R]
        x1, x2 = load_pairs(x_ptrs, mask, HALF, BLOCK_HALF, INTERLEAVED)  # [BLOCK_R, BLOCK_HALF]
        dy1, dy2 = load_pairs(dy_ptr + offs, mask, HALF, BLOCK_HALF, INTERLEAVED)  # [BLOCK_R, BLOCK_HALF]
        cos, sin = load_angles(cos_ptr, sin_ptr, n, mask, HALF, BLOCK_HALF)  # [BLOCK_R, BLOCK_HALF]
        rstd = tl.rsqrt(sum_pairs(x1 * x1, x2 * x2) / (2 * HALF) + eps)  # [BLOCK_R]
        rstd = tl.where(mask, rstd, 0.0)[:, None]  # [BLOCK_R, 1] infinite without eps in absent rows: inf * 0 is NaN
        x1 = x1 * rstd  # [BLOCK_R, BLOCK_HALF]
        x2 = x2 * rstd  # [BLOCK_R, BLOCK_HALF]
        g1 = dy1 * cos + dy2 * sin  # [BLOCK_R, BLOCK_HALF] the gradient of the normed head
        g2 = dy2 * cos - dy1 * sin  # [BLOCK_R, BLOCK_HALF]
        dw1 += g1 * x1  # [BLOCK_R, BLOCK_HALF]
        dw2 += g2 * x2  # [BLOCK_R, BLOCK_HALF]
        g1 = g1 * w1  # [BLOCK_R, BLOCK_HALF]
        g2 = g2 * w2  # [BLOCK_R, BLOCK_HALF]
        mean = (sum_pairs(x1 * g1, x2 * g2) / (2 * HALF))[:, None]  # [BLOCK_R, 1]
        dx1 = (g1 - x1 * mean) * rstd  # [BLOCK_R, BLOCK_HALF]
        dx2 = (g2 - x2 * mean) * rstd  # [BLOCK_R, BLOCK_HALF]
        store_pairs(dx_ptr + offs, mask, dx1, dx2, HALF, BLOCK_HALF, INTERLEAVED)
    partials_ptr += tl.program_id(0) * (2 * HALF)
    store_row_pairs(partials_ptr, tl.sum(dw1, 0), tl.sum(dw2, 0), HALF, BLOCK_HALF, INTERLEAVED)


@triton.jit
def _qk_norm_rotary_backward_kernel(
    dq_out_ptr,  # [B, N, H_Q, 2·HALF] contiguous
    dk_out_ptr,  # [B, N, H_K, 2·HALF] contiguous
    q_ptr,  # [B, N, H_Q, 2·HALF], any strides but that of the columns; so is k
    k_ptr,  # [B, N, H_K, 2·HALF]
    q_weight_ptr,  # [2·HALF]
    k_weight_ptr,  # [2·HALF]
    cos_ptr,  # [N, HALF]
    sin_ptr,  # [N, HALF]
    dq_ptr,  # contiguous, as are all outputs
    dk_ptr,
    partials_ptr,  # [2, PARTS or fewer, 2·HALF] float32, of q's weight and k's
    stride_qb,
    stride_kb,
    eps,
    total,
    blocks,  # of a sample's queries or keys, whichever are more
    N,
    H_Q: tl.constexpr,
    H_K: tl.constexpr,
    STRIDE_QN: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KN: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _norm_backward_rows(
            dy_ptr=dq_out_ptr,
            x_ptr=q_ptr,
            weight_ptr=q_weight_ptr,
            cos_ptr=cos_ptr,
            sin_ptr=sin_ptr,
            dx_ptr=dq_ptr,
            partials_ptr=partials_ptr,
            eps=eps,
            total=total,
            blocks=blocks,
            N=N,
            H=H_Q,
            STRIDE_B=stride_qb,
            STRIDE_N=STRIDE_QN,
            STRIDE_H=STRIDE_QH,
            HALF=HALF,
            BLOCK_HALF=BLOCK_HALF,
            INTERLEAVED=INTERLEAVED,
            BLOCK_R=BLOCK_R,
            PARTS=PARTS,
        )
    else:
        _norm_backward_rows(
            dy_ptr=dk_out_ptr,
            x_ptr=k_ptr,
            weight_ptr=k_weight_ptr,
            cos_ptr=cos_ptr,
            sin_ptr=sin_ptr,
            dx_ptr=dk_ptr,
            partials_ptr=partials_ptr + tl.num_programs(0) * (2 * HALF),
            eps=eps,
            total=total,
            blocks=blocks,
            N=N,
            H=H_K,
            STRIDE_B=stride_kb,
            STRIDE_N=STRIDE_KN,
            STRIDE_H=STRIDE_KH,
            HALF=HALF,
            BLOCK_HALF=BLOCK_HALF,
            INTERLEAVED=INTERLEAVED,
            BLOCK_R=BLOCK_R,
            PARTS=PARTS,
        )


# ----------------------------------------------------------------------------------------------------------- launchers


def norm_backward_launch(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    dq: Tensor,
    dk: Tensor,
    partials: Tensor,
    *,
    eps: float,
    interleaved: bool,
    config: Config,
) -> Launch:
    """The launch that fills dq, dk and the partial sums (2, parts, d) of the weights' gradients."""
    B, N, H, d = q.shape
    stride_qb, STRIDE_QN, STRIDE_QH = strides_of(q)
    stride_kb, STRIDE_KN, STRIDE_KH = strides_of(k)
    blocks = blocks_of(q, k, config)
    return Launch(
        _qk_norm_rotary_backward_kernel,
        lambda config: (partials.shape[1], 2),
        config,
        q.device,
        dq_out_ptr=dq_out,
        dk_out_ptr=dk_out,
        q_ptr=q,
        k_ptr=k,
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        cos_ptr=cos,
        sin_ptr=sin,
        dq_ptr=dq,
        dk_ptr=dk,
        partials_ptr=partials,
        stride_qb=stride_qb,
        stride_kb=stride_kb,
        eps=eps,
        total=B * blocks,
        blocks=blocks,
        N=N,
        H_Q=H,
        H_K=k.shape[2],
        STRIDE_QN=STRIDE_QN,
        STRIDE_QH=STRIDE_QH,
        STRIDE_KN=STRIDE_KN,
        STRIDE_KH=STRIDE_KH,
        HALF=d // 2,
        BLOCK_HALF=block_of_half(d),
        INTERLEAVED=interleaved,
    )


@planned
def qk_norm_rotary_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, contiguous, and the gradients of both weights (2, d) in float32."""
    dq, dk = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k))  # [B, N, H, d], [B, N, H_kv, d]
    if q.numel() == 0 and k.numel() == 0:
        return dq, dk, q_weight.new_zeros((2, q.shape[-1]), dtype=torch.float32)
    q, k = as_heads(q), as_heads(k)
    d = q.shape[-1]
    config = launch_config("qk_norm_rotary_backward", q.device, q.dtype, head_dim=d)
    parts = min(q.shape[0] * blocks_of(q, k, config), config["PARTS"])
    partials = torch.empty((2, parts, d), device=q.device, dtype=torch.float32)  # [2, parts, d]
    launch = norm_backward_launch(
        dq_out.contiguous(),
        dk_out.contiguous(),
        q,
        k,
        q_weight.contiguous(),
        k_weight.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        dq,
        dk,
        partials,
        eps=eps,
        interleaved=interleaved,
        config=config,
    )
    launch.run()
    return dq, dk, sum_partials(partials, torch.float32)
