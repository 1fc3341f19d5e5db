"""Triton adaptive layer norm, alone or behind a gated residual update: output and tangent in one launch; backward.

With a residual, x_new = x + gate·y is written and normed in one read and one write of the stream. The backward adds up
shift, scale and gate gradients over a chunk of tokens in registers; a second launch adds the chunks: no atomics.
"""

# mypy: allow-untyped-defs

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, launch_config
from ..rowwise import (
    block_of,
    contiguous,
    load_row,
    load_rows,
    per_sample,
    store_row,
    store_rows,
    sum_partials,
    zero_past,
)


@triton.jit
def _ada_layer_norm_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    x_dot_ptr,
    y_dot_ptr,
    gate_dot_ptr,
    shift_dot_ptr,
    scale_dot_ptr,
    x_new_ptr,
    h_ptr,
    x_new_dot_ptr,
    h_dot_ptr,
    stats_ptr,
    stride_gate,
    stride_shift,
    stride_scale,
    stride_gate_dot,
    stride_shift_dot,
    stride_scale_dot,
    eps,
    B_t,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_TANGENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of tokens of one sample, whose vectors come from L1 after the first (registers are worth more)."""
    chunks = tl.cdiv(N, CHUNK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    for start in range(0, tl.minimum(CHUNK, N - chunk * CHUNK), BLOCK_N):
        offs_n = chunk * CHUNK + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N  # [BLOCK_N]
        rows = b * N + offs_n  # [BLOCK_N]
        x = load_rows(x_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        if HAS_RESIDUAL:
            y = load_rows(y_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            gate = load_row(gate_ptr + b * stride_gate, D, BLOCK_D)  # [1, BLOCK_D]
            # the norm sees x_new as it is stored: the backward reads it from there
            x = (x + gate * y).to(x_new_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_D]
            store_rows(x_new_ptr, rows, mask_n, x, D, BLOCK_D)
            x = x.to(tl.float32)
        mean = tl.sum(x, 1) / D  # [BLOCK_N]
        centred = zero_past(x - mean[:, None], D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)  # [BLOCK_N]
        x_hat = centred * rstd[:, None]  # [BLOCK_N, BLOCK_D]
        gain = 1.0 + load_row(scale_ptr + b * stride_scale, D, BLOCK_D)  # [1, BLOCK_D]
        shift = load_row(shift_ptr + b * stride_shift, D, BLOCK_D)  # [1, BLOCK_D]
        store_rows(h_ptr, rows, mask_n, x_hat * gain + shift, D, BLOCK_D)
        tl.store(stats_ptr + rows * 2, mean, mask=mask_n)
        tl.store(stats_ptr + rows * 2 + 1, rstd, mask=mask_n)

        if HAS_TANGENT:  # noqa: SIM102 (a constant, decided before b is compared)
            if b < B_t:
                h_dot = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
                if x_dot_ptr is not None or HAS_RESIDUAL:
                    x_dot = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
                    if x_dot_ptr is not None:
                        x_dot = load_rows(x_dot_ptr, rows, mask_n, D, BLOCK_D)
                    if HAS_RESIDUAL:
                        if y_dot_ptr is not None:
                            x_dot += gate * load_rows(y_dot_ptr, rows, mask_n, D, BLOCK_D)
                        if gate_dot_ptr is not None:
                            x_dot += load_row(gate_dot_ptr + b * stride_gate_dot, D, BLOCK_D) * y
                        store_rows(x_new_dot_ptr, rows, mask_n, x_dot, D, BLOCK_D)
                    mean_dot = tl.sum(x_dot, 1) / D  # [BLOCK_N]
                    coupling = tl.sum(x_hat * x_dot, 1) / D  # [BLOCK_N]
                    x_hat_dot = (x_dot - mean_dot[:, None] - x_hat * coupling[:, None]) * rstd[:, None]
                    h_dot = x_hat_dot * gain  # [BLOCK_N, BLOCK_D]
                if scale_dot_ptr is not None:
                    h_dot += x_hat * load_row(scale_dot_ptr + b * stride_scale_dot, D, BLOCK_D)
                if shift_dot_ptr is not None:
                    h_dot += load_row(shift_dot_ptr + b * stride_shift_dot, D, BLOCK_D)
                store_rows(h_dot_ptr, rows, mask_n, h_dot, D, BLOCK_D)


@triton.jit
def _ada_layer_norm_backward_kernel(
    dh_ptr,
    dx_new_ptr,
    x_new_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    stats_ptr,
    dx_ptr,
    dy_ptr,
    partials_ptr,
    stride_gate,
    stride_scale,
    N,
    CHUNKS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of tokens of one sample; partials are [dshift, dscale, dgate] × [B, CHUNKS, D]."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    gain = 1.0 + load_row(scale_ptr + b * stride_scale, D, BLOCK_D)  # [1, BLOCK_D]
    dshift = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    dscale = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    if HAS_RESIDUAL:
        gate = load_row(gate_ptr + b * stride_gate, D, BLOCK_D)  # [1, BLOCK_D]
        dgate = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    for start in range(0, tl.minimum(CHUNK, N - chunk * CHUNK), BLOCK_N):
        offs_n = chunk * CHUNK + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N  # [BLOCK_N]
        rows = b * N + offs_n  # [BLOCK_N]
        dh = load_rows(dh_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        x = load_rows(x_new_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        mean = tl.load(stats_ptr + rows * 2, mask=mask_n, other=0.0)  # [BLOCK_N]
        rstd = tl.load(stats_ptr + rows * 2 + 1, mask=mask_n, other=0.0)  # [BLOCK_N]
        x_hat = (x - mean[:, None]) * rstd[:, None]  # [BLOCK_N, BLOCK_D]; past D it only ever meets zeros
        dshift += dh
        dscale += dh * x_hat
        dx_hat = dh * gain  # [BLOCK_N, BLOCK_D]
        dmean = tl.sum(dx_hat, 1) / D  # [BLOCK_N]
        coupling = tl.sum(dx_hat * x_hat, 1) / D  # [BLOCK_N]
        dx = (dx_hat - dmean[:, None] - x_hat * coupling[:, None]) * rstd[:, None]  # [BLOCK_N, BLOCK_D]
        if dx_new_ptr is not None:
            dx += load_rows(dx_new_ptr, rows, mask_n, D, BLOCK_D)
        store_rows(dx_ptr, rows, mask_n, dx, D, BLOCK_D)
        if HAS_RESIDUAL:
            store_rows(dy_ptr, rows, mask_n, dx * gate, D, BLOCK_D)
            dgate += dx * load_rows(y_ptr, rows, mask_n, D, BLOCK_D)
    B = tl.num_programs(0) // CHUNKS
    row = partials_ptr + tl.program_id(0).to(tl.int64) * D
    plane = (B * CHUNKS).to(tl.int64) * D
    store_row(row, tl.sum(dshift, 0), D, BLOCK_D)
    store_row(row + plane, tl.sum(dscale, 0), D, BLOCK_D)
    if HAS_RESIDUAL:
        store_row(row + 2 * plane, tl.sum(dgate, 0), D, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------- launchers


def forward_launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    x_new: Tensor | None,
    h: Tensor,
    x_new_dot: Tensor | None,
    h_dot: Tensor | None,
    stats: Tensor,
    *,
    eps: float,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills x_new, h, their tangents and stats; big tensors contiguous, y is None: no residual."""
    B, N, D = x.shape
    B_t = 0 if h_dot is None else h_dot.shape[0]
    gate, stride_gate = per_sample(gate)
    shift_, stride_shift = per_sample(shift)
    scale_, stride_scale = per_sample(scale)
    gate_dot, stride_gate_dot = per_sample(gate_dot)
    shift_dot, stride_shift_dot = per_sample(shift_dot)
    scale_dot, stride_scale_dot = per_sample(scale_dot)
    return Launch.of(
        _ada_layer_norm_forward_kernel,
        lambda config: (B * cdiv(N, config["CHUNK"]),),
        config or launch_config("ada_layer_norm_forward", x.device, x.dtype, width=D),
        x.device,
        x_ptr=x,
        y_ptr=y,
        gate_ptr=gate,
        shift_ptr=shift_,
        scale_ptr=scale_,
        x_dot_ptr=x_dot if B_t else None,
        y_dot_ptr=y_dot if B_t else None,
        gate_dot_ptr=gate_dot if B_t else None,
        shift_dot_ptr=shift_dot if B_t else None,
        scale_dot_ptr=scale_dot if B_t else None,
        x_new_ptr=x_new,
        h_ptr=h,
        x_new_dot_ptr=x_new_dot if B_t else None,
        h_dot_ptr=h_dot if B_t else None,
        stats_ptr=stats,
        stride_gate=stride_gate,
        stride_shift=stride_shift,
        stride_scale=stride_scale,
        stride_gate_dot=stride_gate_dot,
        stride_shift_dot=stride_shift_dot,
        stride_scale_dot=stride_scale_dot,
        eps=eps,
        B_t=B_t,
        N=N,
        D=D,
        BLOCK_D=block_of(D),
        HAS_RESIDUAL=y is not None,
        HAS_TANGENT=B_t > 0,
    )


def norm_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    *,
    eps: float,
    x_dtype: torch.dtype,
    h_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor]:
    """x_new and h [B, N, D], their tangents [B_t, N, D], mean and rstd [B, N, 2]; x_new and its tangent only with y."""
    dots = (x_dot, y_dot, gate_dot, shift_dot, scale_dot)
    B_t = next((a.shape[0] for a in dots if a is not None), None)
    B, N, D = x.shape

    def new(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, N, D), device=x.device, dtype=dtype)

    h = new(B, h_dtype)  # [B, N, D]
    h_dot = None if B_t is None else new(B_t, h_dtype)  # [B_t, N, D]
    x_new = None if y is None else new(B, x_dtype)  # [B, N, D]
    x_new_dot = None if y is None or B_t is None else new(B_t, x_dtype)  # [B_t, N, D]
    stats = torch.empty((B, N, 2), device=x.device, dtype=torch.float32)  # [B, N, mean and rstd]
    if h.numel():
        launch = forward_launch(
            x.contiguous(),
            contiguous(y),
            gate,
            shift,
            scale,
            contiguous(x_dot),
            contiguous(y_dot),
            gate_dot,
            shift_dot,
            scale_dot,
            x_new,
            h,
            x_new_dot,
            h_dot,
            stats,
            eps=eps,
        )
        launch.run()
    return x_new, h, x_new_dot, h_dot, stats


def backward_launch(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    dx: Tensor,
    dy: Tensor | None,
    partials: Tensor,
    *,
    config: Mapping[str, int],
) -> Launch:
    """The launch that fills dx, dy and partials [2 or 3, B, chunks of config["CHUNK"] tokens, D]."""
    B, N, D = x_new.shape
    chunks = partials.shape[2]
    gate, stride_gate = per_sample(gate)
    scale_, stride_scale = per_sample(scale)
    return Launch.of(
        _ada_layer_norm_backward_kernel,
        lambda config: (B * chunks,),
        config,
        x_new.device,
        dh_ptr=dh,
        dx_new_ptr=dx_new,
        x_new_ptr=x_new,
        y_ptr=y,
        gate_ptr=gate,
        scale_ptr=scale_,
        stats_ptr=stats,
        dx_ptr=dx,
        dy_ptr=dy,
        partials_ptr=partials,
        stride_gate=stride_gate,
        stride_scale=stride_scale,
        N=N,
        CHUNKS=chunks,
        D=D,
        BLOCK_D=block_of(D),
        HAS_RESIDUAL=y is not None,
    )


def norm_backward(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    *,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dx and dy [B, N, D] (dy only with y), and [dshift, dscale, with y dgate] stacked as [2 or 3, B, D]."""
    B, N, D = x_new.shape
    dx = torch.empty(x_new.shape, device=x_new.device, dtype=x_dtype)  # [B, N, D]
    dy = None if y is None else torch.empty(y.shape, device=y.device, dtype=y.dtype)  # [B, N, D]
    planes = 2 if y is None else 3
    if dx.numel() == 0:
        return dx, dy, torch.zeros((planes, B, D), device=scale.device, dtype=scale.dtype)
    config = launch_config("ada_layer_norm_backward", x_new.device, x_new.dtype, width=D)
    chunks = cdiv(N, config["CHUNK"])
    dtype = scale.dtype if chunks == 1 else torch.float32
    partials = torch.empty((planes, B, chunks, D), device=scale.device, dtype=dtype)  # [planes, B, chunks, D]
    launch = backward_launch(
        dh.contiguous(),
        contiguous(dx_new),
        x_new,
        contiguous(y),
        gate,
        scale,
        stats,
        dx,
        dy,
        partials,
        config=config,
    )
    launch.run()
    if chunks > 1:
        partials = sum_partials(partials.view(planes * B, chunks, D), scale.dtype)  # [planes·B, D]
    return dx, dy, partials.view(planes, B, D)
