"""Triton rotary embedding of queries and keys, with or without the norm of each head before it: one launch for both.

Output and tangent in one read and one write; the backward turns back, then takes the norm's. README.md derives it.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Launch, cdiv, launch_config, next_power_of_2
from ..plan import planned


@triton.jit
def pair_columns(HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of the first and the second channel of each pair; those past HALF pairs are to be masked."""
    pairs = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    if INTERLEAVED:
        return 2 * pairs, 2 * pairs + 1
    else:
        return pairs, HALF + pairs


@triton.jit
def load_pairs(ptrs, mask_rows, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second channels of the pairs of the heads at ptrs [BLOCK_R], float32."""
    if INTERLEAVED:
        # 16 bytes at a time, then apart: two loads with a stride of two would move 2 bytes each
        cols = tl.arange(0, 2 * BLOCK_HALF)  # [2·BLOCK_HALF]
        mask = mask_rows[:, None] & (cols < 2 * HALF)[None, :]  # [BLOCK_R, 2·BLOCK_HALF]
        x = tl.load(ptrs[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, [x.shape[0], BLOCK_HALF, 2]))
    else:
        pairs = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
        mask = mask_rows[:, None] & (pairs < HALF)[None, :]  # [BLOCK_R, BLOCK_HALF]
        first = tl.load(ptrs[:, None] + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(ptrs[:, None] + (HALF + pairs)[None, :], mask=mask, other=0.0).to(tl.float32)
        return first, second


@triton.jit
def store_pairs(
    ptrs,
    mask_rows,
    first,
    second,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    dtype = ptrs.dtype.element_ty
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)  # [2·BLOCK_HALF]
        mask = mask_rows[:, None] & (cols < 2 * HALF)[None, :]  # [BLOCK_R, 2·BLOCK_HALF]
        tl.store(ptrs[:, None] + cols[None, :], tl.interleave(first.to(dtype), second.to(dtype)), mask=mask)
    else:
        pairs = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
        mask = mask_rows[:, None] & (pairs < HALF)[None, :]  # [BLOCK_R, BLOCK_HALF]
        tl.store(ptrs[:, None] + pairs[None, :], first.to(dtype), mask=mask)
        tl.store(ptrs[:, None] + (HALF + pairs)[None, :], second.to(dtype), mask=mask)


@triton.jit
def load_row_pairs(ptr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs of one vector of 2·HALF as [1, BLOCK_HALF] twice, float32."""
    first, second = pair_columns(HALF, BLOCK_HALF, INTERLEAVED)
    mask = tl.arange(0, BLOCK_HALF) < HALF  # [BLOCK_HALF]
    x1 = tl.load(ptr + first, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_HALF]
    x2 = tl.load(ptr + second, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_HALF]
    return x1[None, :], x2[None, :]


@triton.jit
def load_angles(cos_ptr, sin_ptr, n, mask_rows, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """cos and sin of the tokens n as [BLOCK_R, BLOCK_HALF], float32."""
    pairs = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    mask = mask_rows[:, None] & (pairs < HALF)[None, :]  # [BLOCK_R, BLOCK_HALF]
    offs = n[:, None] * HALF + pairs[None, :]  # [BLOCK_R, BLOCK_HALF]
    cos = tl.load(cos_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def sum_pairs(first, second):
    return tl.sum(first, 1) + tl.sum(second, 1)


@triton.jit
def _forward_rows(
    x_ptr,
    x_dot_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    y_dot_ptr,
    eps,
    block,
    blocks,
    B_t,
    N,
    H: tl.constexpr,
    STRIDE_B,
    STRIDE_N: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_DOT_B,
    STRIDE_DOT_N: tl.constexpr,
    STRIDE_DOT_H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One block of heads of one sample, of queries or of keys; BACKWARD turns the other way."""
    b = (block // blocks).to(tl.int64)
    heads = (block % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R] of the N·H of a sample
    mask = heads < N * H  # [BLOCK_R]
    n, h = heads // H, heads % H  # [BLOCK_R]
    n_wide = n.to(tl.int64)  # [BLOCK_R]
    x_ptrs = x_ptr + (b * STRIDE_B + n_wide * STRIDE_N + h * STRIDE_H)  # [BLOCK_R]
    offs_y = (b * N * H + heads) * (2 * HALF)  # [BLOCK_R]
    x1, x2 = load_pairs(x_ptrs, mask, HALF, BLOCK_HALF, INTERLEAVED)  # [BLOCK_R, BLOCK_HALF]
    cos, sin = load_angles(cos_ptr, sin_ptr, n, mask, HALF, BLOCK_HALF)  # [BLOCK_R, BLOCK_HALF]
    if BACKWARD:
        sin = -sin
    if weight_ptr is not None:
        w1, w2 = load_row_pairs(weight_ptr, HALF, BLOCK_HALF, INTERLEAVED)  # [1, BLOCK_HALF]
        rstd = tl.rsqrt(sum_pairs(x1 * x1, x2 * x2) / (2 * HALF) + eps)[:, None]  # [BLOCK_R, 1]
        x1 = x1 * rstd  # [BLOCK_R, BLOCK_HALF]
        x2 = x2 * rstd  # [BLOCK_R, BLOCK_HALF]
        y1 = x1 * w1  # [BLOCK_R, BLOCK_HALF]
        y2 = x2 * w2  # [BLOCK_R, BLOCK_HALF]
    else:
        y1, y2 = x1, x2
    y_ptrs = y_ptr + offs_y  # [BLOCK_R]
    store_pairs(y_ptrs, mask, y1 * cos - y2 * sin, y1 * sin + y2 * cos, HALF, BLOCK_HALF, INTERLEAVED)
    if x_dot_ptr is not None and b < B_t:
        dot_ptrs = x_dot_ptr + (b * STRIDE_DOT_B + n_wide * STRIDE_DOT_N + h * STRIDE_DOT_H)  # [BLOCK_R]
        d1, d2 = load_pairs(dot_ptrs, mask, HALF, BLOCK_HALF, INTERLEAVED)  # [BLOCK_R, BLOCK_HALF]
        if weight_ptr is not None:
            mean = (sum_pairs(x1 * d1, x2 * d2) / (2 * HALF))[:, None]  # [BLOCK_R, 1]
            d1 = (d1 - x1 * mean) * rstd * w1  # [BLOCK_R, BLOCK_HALF]
            d2 = (d2 - x2 * mean) * rstd * w2  # [BLOCK_R, BLOCK_HALF]
        y_dot_ptrs = y_dot_ptr + offs_y  # [BLOCK_R]
        store_pairs(y_dot_ptrs, mask, d1 * cos - d2 * sin, d1 * sin + d2 * cos, HALF, BLOCK_HALF, INTERLEAVED)


@triton.jit
def _rotary_forward_kernel(
    q_ptr,  # [B, N, H_Q, 2·HALF], any strides but that of the columns; so are k and the tangents
    k_ptr,  # [B, N, H_K, 2·HALF]
    q_dot_ptr,  # [B_t, N, H_Q, 2·HALF] or None
    k_dot_ptr,  # [B_t, N, H_K, 2·HALF] or None
    q_weight_ptr,  # [2·HALF], or None for no norm
    k_weight_ptr,  # [2·HALF], or None for no norm
    cos_ptr,  # [N, HALF]
    sin_ptr,  # [N, HALF]
    q_out_ptr,  # contiguous, as are all outputs
    k_out_ptr,
    q_out_dot_ptr,
    k_out_dot_ptr,
    stride_qb,
    stride_kb,
    stride_q_dot_b,
    stride_k_dot_b,
    eps,
    blocks,  # of a sample's queries or keys, whichever are more
    B_tq,
    B_tk,
    N,
    H_Q: tl.constexpr,
    H_K: tl.constexpr,
    STRIDE_QN: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KN: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_Q_DOT_N: tl.constexpr,
    STRIDE_Q_DOT_H: tl.constexpr,
    STRIDE_K_DOT_N: tl.constexpr,
    STRIDE_K_DOT_H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _forward_rows(
            x_ptr=q_ptr,
            x_dot_ptr=q_dot_ptr,
            weight_ptr=q_weight_ptr,
            cos_ptr=cos_ptr,
            sin_ptr=sin_ptr,
            y_ptr=q_out_ptr,
            y_dot_ptr=q_out_dot_ptr,
            eps=eps,
            block=tl.program_id(0),
            blocks=blocks,
            B_t=B_tq,
            N=N,
            H=H_Q,
            STRIDE_B=stride_qb,
            STRIDE_N=STRIDE_QN,
            STRIDE_H=STRIDE_QH,
            STRIDE_DOT_B=stride_q_dot_b,
            STRIDE_DOT_N=STRIDE_Q_DOT_N,
            STRIDE_DOT_H=STRIDE_Q_DOT_H,
            HALF=HALF,
            BLOCK_HALF=BLOCK_HALF,
            INTERLEAVED=INTERLEAVED,
            BACKWARD=BACKWARD,
            BLOCK_R=BLOCK_R,
        )
    else:
        _forward_rows(
            x_ptr=k_ptr,
            x_dot_ptr=k_dot_ptr,
            weight_ptr=k_weight_ptr,
            cos_ptr=cos_ptr,
            sin_ptr=sin_ptr,
            y_ptr=k_out_ptr,
            y_dot_ptr=k_out_dot_ptr,
            eps=eps,
            block=tl.program_id(0),
            blocks=blocks,
            B_t=B_tk,
            N=N,
            H=H_K,
            STRIDE_B=stride_kb,
            STRIDE_N=STRIDE_KN,
            STRIDE_H=STRIDE_KH,
            STRIDE_DOT_B=stride_k_dot_b,
            STRIDE_DOT_N=STRIDE_K_DOT_N,
            STRIDE_DOT_H=STRIDE_K_DOT_H,
            HALF=HALF,
            BLOCK_HALF=BLOCK_HALF,
            INTERLEAVED=INTERLEAVED,
            BACKWARD=BACKWARD,
            BLOCK_R=BLOCK_R,
        )


# ----------------------------------------------------------------------------------------------------------- launchers


def as_heads(x: Tensor) -> Tensor:
    """x itself where the columns of a head lie next to each other, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_of(x: Tensor | None) -> tuple[int, ...]:
    """Of batch, token and head. A dimension of one has none: torch leaves any number there."""
    if x is None:
        return 0, 0, 0
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True))


def block_of_half(d: int) -> int:
    return max(16, next_power_of_2(d // 2))


def blocks_of(q: Tensor, k: Tensor, config: Config) -> int:
    return cdiv(q.shape[1] * max(q.shape[2], k.shape[2]), config["BLOCK_R"])


def forward_launch(
    q: Tensor,
    k: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    q_out_dot: Tensor | None,
    k_out_dot: Tensor | None,
    *,
    eps: float,
    interleaved: bool,
    backward: bool = False,
    config: Config | None = None,
) -> Launch:
    """The launch that fills the outputs; inputs as `as_heads` leaves them, tables, weights and outputs contiguous."""
    B, N, H, d = q.shape
    config = config or launch_config("rotary", q.device, q.dtype, head_dim=d)
    stride_qb, STRIDE_QN, STRIDE_QH = strides_of(q)
    stride_kb, STRIDE_KN, STRIDE_KH = strides_of(k)
    stride_q_dot_b, STRIDE_Q_DOT_N, STRIDE_Q_DOT_H = strides_of(q_dot)
    stride_k_dot_b, STRIDE_K_DOT_N, STRIDE_K_DOT_H = strides_of(k_dot)
    blocks = blocks_of(q, k, config)
    return Launch(
        _rotary_forward_kernel,
        lambda config: (B * blocks, 2),
        config,
        q.device,
        q_ptr=q,
        k_ptr=k,
        q_dot_ptr=q_dot,
        k_dot_ptr=k_dot,
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        cos_ptr=cos,
        sin_ptr=sin,
        q_out_ptr=q_out,
        k_out_ptr=k_out,
        q_out_dot_ptr=q_out_dot,
        k_out_dot_ptr=k_out_dot,
        stride_qb=stride_qb,
        stride_kb=stride_kb,
        stride_q_dot_b=stride_q_dot_b,
        stride_k_dot_b=stride_k_dot_b,
        eps=eps,
        blocks=blocks,
        B_tq=0 if q_dot is None else q_dot.shape[0],
        B_tk=0 if k_dot is None else k_dot.shape[0],
        N=N,
        H_Q=H,
        H_K=k.shape[2],
        STRIDE_QN=STRIDE_QN,
        STRIDE_QH=STRIDE_QH,
        STRIDE_KN=STRIDE_KN,
        STRIDE_KH=STRIDE_KH,
        STRIDE_Q_DOT_N=STRIDE_Q_DOT_N,
        STRIDE_Q_DOT_H=STRIDE_Q_DOT_H,
        STRIDE_K_DOT_N=STRIDE_K_DOT_N,
        STRIDE_K_DOT_H=STRIDE_K_DOT_H,
        HALF=d // 2,
        BLOCK_HALF=block_of_half(d),
        INTERLEAVED=interleaved,
        BACKWARD=backward,
    )


@planned
def rotary_forward(
    q: Tensor,
    k: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 0.0,
    interleaved: bool,
    backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """q and k turned (after the norm with their weights, where given) and their tangents, all contiguous."""
    q_out, k_out = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k))  # [B, N, H, d]
    q_out_dot, k_out_dot = (
        None if x is None else torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q_dot, k_dot)
    )  # [B_t, N, H, d]

    def present(x: Tensor | None) -> Tensor | None:
        return None if x is None or x.numel() == 0 else as_heads(x)

    if q.numel() or k.numel():
        launch = forward_launch(
            as_heads(q),
            as_heads(k),
            present(q_dot),
            present(k_dot),
            None if q_weight is None else q_weight.contiguous(),
            None if k_weight is None else k_weight.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            q_out,
            k_out,
            present(q_out_dot),
            present(k_out_dot),
            eps=eps,
            interleaved=interleaved,
            backward=backward,
        )
        launch.run()
    return q_out, k_out, q_out_dot, k_out_dot
