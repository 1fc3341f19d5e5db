"""Triton adaptive layer norm, alone or behind a gated residual update: output and tangent in one launch; backward.

With a residual, x_new = x + gate·(y + bias) is normed in one read of the stream, and written unless the update after
this one makes it again ("base": that update reads x, and the y, gate and bias of the first). The backward adds up the
gradients of shift, scale, gate and bias over a chunk of tokens in registers; another launch adds the chunks: no
atomics.
"""

# mypy: allow-untyped-defs

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, launch_config, with_fitting_chunk
from ..plan import planned
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
def updated(x, y, gate, bias_ptr, stored_dtype: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x + gate·(y + bias) as it is stored: whoever makes it again gets the same number."""
    if bias_ptr is not None:
        y += load_row(bias_ptr, D, BLOCK_D)
    return (x + gate * y).to(stored_dtype).to(tl.float32)


@triton.jit
def _ada_layer_norm_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    bias_ptr,
    base_y_ptr,
    base_gate_ptr,
    base_bias_ptr,
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
    stride_base_gate,
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
    DEFERRED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of tokens of one sample, whose vectors come from L1 after the first (registers are worth more).

    `DEFERRED`: x_new is not written; its first element is NaN, for whoever reads it nevertheless.
    """
    chunks = tl.cdiv(N, CHUNK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    for start in range(0, tl.minimum(CHUNK, N - chunk * CHUNK), BLOCK_N):
        offs_n = chunk * CHUNK + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N  # [BLOCK_N]
        rows = b * N + offs_n  # [BLOCK_N]
        x = load_rows(x_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        if HAS_RESIDUAL:
            stored: tl.constexpr = x_new_ptr.dtype.element_ty
            if base_y_ptr is not None:
                base_y = load_rows(base_y_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
                base_gate = load_row(base_gate_ptr + b * stride_base_gate, D, BLOCK_D)  # [1, BLOCK_D]
                x = updated(x, base_y, base_gate, base_bias_ptr, stored, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            y = load_rows(y_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            gate = load_row(gate_ptr + b * stride_gate, D, BLOCK_D)  # [1, BLOCK_D]
            # the norm sees x_new as it is stored: the backward reads it from there
            x = updated(x, y, gate, bias_ptr, stored, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            if not DEFERRED:
                store_rows(x_new_ptr, rows, mask_n, x, D, BLOCK_D)
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
                            if bias_ptr is not None:
                                y += load_row(bias_ptr, D, BLOCK_D)
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
    if DEFERRED:
        tl.store(x_new_ptr, float("nan"), mask=tl.program_id(0) == 0)


@triton.jit
def _ada_layer_norm_backward_kernel(
    dh_ptr,
    dx_new_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    bias_ptr,
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
    DEFERRED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of tokens of one sample; partials are [dshift, dscale, dgate, dbias] × [B, CHUNKS, D].

    `x_ptr` is what was normed; `DEFERRED`: what was updated, from which that is made again.
    """
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    gain = 1.0 + load_row(scale_ptr + b * stride_scale, D, BLOCK_D)  # [1, BLOCK_D]
    dshift = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    dscale = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    if HAS_RESIDUAL:
        gate = load_row(gate_ptr + b * stride_gate, D, BLOCK_D)  # [1, BLOCK_D]
        dgate = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
        if bias_ptr is not None:
            dx_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    for start in range(0, tl.minimum(CHUNK, N - chunk * CHUNK), BLOCK_N):
        offs_n = chunk * CHUNK + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N  # [BLOCK_N]
        rows = b * N + offs_n  # [BLOCK_N]
        dh = load_rows(dh_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        x = load_rows(x_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        if dx_new_ptr is not None:  # before the sums over the row, so that it is on its way meanwhile
            dx_new = load_rows(dx_new_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        if HAS_RESIDUAL:
            y = load_rows(y_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            if DEFERRED:
                x = updated(x, y, gate, bias_ptr, x_ptr.dtype.element_ty, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
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
            dx += dx_new
        store_rows(dx_ptr, rows, mask_n, dx, D, BLOCK_D)
        if HAS_RESIDUAL:
            store_rows(dy_ptr, rows, mask_n, dx * gate, D, BLOCK_D)
            dgate += dx * y
            if bias_ptr is not None:
                dx_sum += dx
    B = tl.num_programs(0) // CHUNKS
    row = partials_ptr + tl.program_id(0).to(tl.int64) * D
    plane = (B * CHUNKS).to(tl.int64) * D
    store_row(row, tl.sum(dshift, 0), D, BLOCK_D)
    store_row(row + plane, tl.sum(dscale, 0), D, BLOCK_D)
    if HAS_RESIDUAL:
        dgate_row = tl.sum(dgate, 0)  # [BLOCK_D]
        if bias_ptr is not None:
            dx_row = tl.sum(dx_sum, 0)  # [BLOCK_D]
            dgate_row += tl.sum(load_row(bias_ptr, D, BLOCK_D), 0) * dx_row
            store_row(row + 3 * plane, tl.sum(gate, 0) * dx_row, D, BLOCK_D)
        store_row(row + 2 * plane, dgate_row, D, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------- launchers


class Update(NamedTuple):
    """x + gate·(y + bias): y [B, N, D], gate [B, D], bias [D] or None."""

    y: Tensor
    gate: Tensor
    bias: Tensor | None = None


class Tangents(NamedTuple):
    """Of the first B_t samples, or None: x and y [B_t, N, D]; gate, shift and scale [B_t, D]."""

    x: Tensor | None = None
    y: Tensor | None = None
    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None


def forward_launch(
    x: Tensor,
    update: Update | None,
    base: Update | None,
    shift: Tensor,
    scale: Tensor,
    dots: Tangents,
    x_new: Tensor | None,
    h: Tensor,
    x_new_dot: Tensor | None,
    h_dot: Tensor | None,
    stats: Tensor,
    *,
    eps: float,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills x_new, h, their tangents and stats; big tensors contiguous.

    What is normed is x + `base` + `update`, each where there is one; x_new of one element is not filled.
    """
    B, N, D = x.shape
    B_t = 0 if h_dot is None else h_dot.shape[0]
    gate, stride_gate = per_sample(None if update is None else update.gate)
    base_gate, stride_base_gate = per_sample(None if base is None else base.gate)
    shift_, stride_shift = per_sample(shift)
    scale_, stride_scale = per_sample(scale)
    gate_dot, stride_gate_dot = per_sample(dots.gate)
    shift_dot, stride_shift_dot = per_sample(dots.shift)
    scale_dot, stride_scale_dot = per_sample(dots.scale)
    return Launch(
        _ada_layer_norm_forward_kernel,
        lambda config: (B * cdiv(N, config["CHUNK"]),),
        config or launch_config("ada_layer_norm_forward", x.device, x.dtype, width=D),
        x.device,
        x_ptr=x,
        y_ptr=None if update is None else update.y,
        gate_ptr=gate,
        bias_ptr=None if update is None else update.bias,
        base_y_ptr=None if base is None else base.y,
        base_gate_ptr=base_gate,
        base_bias_ptr=None if base is None else base.bias,
        shift_ptr=shift_,
        scale_ptr=scale_,
        x_dot_ptr=dots.x if B_t else None,
        y_dot_ptr=dots.y if B_t else None,
        gate_dot_ptr=gate_dot if B_t else None,
        shift_dot_ptr=shift_dot if B_t else None,
        scale_dot_ptr=scale_dot if B_t else None,
        x_new_ptr=x_new,
        h_ptr=h,
        x_new_dot_ptr=x_new_dot if B_t else None,
        h_dot_ptr=h_dot if B_t else None,
        stats_ptr=stats,
        stride_gate=stride_gate,
        stride_base_gate=stride_base_gate,
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
        HAS_RESIDUAL=update is not None,
        HAS_TANGENT=B_t > 0,
        DEFERRED=x_new is not None and x_new.numel() < x.numel(),
    )


@planned
def norm_forward(
    x: Tensor,
    update: Update | None,
    base: Update | None,
    shift: Tensor,
    scale: Tensor,
    dots: Tangents,
    *,
    eps: float,
    x_dtype: torch.dtype,
    h_dtype: torch.dtype,
    defer: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor]:
    """x_new and h [B, N, D], their tangents [B_t, N, D], mean and rstd [B, N, 2].

    x_new and its tangent only with `update`. With `defer` x_new has the shape and no memory: NaN.
    """
    B_t = next((a.shape[0] for a in dots if a is not None), None)
    B, N, D = x.shape

    def new(rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, N, D), device=x.device, dtype=dtype)

    h = new(B, h_dtype)  # [B, N, D]
    h_dot = None if B_t is None else new(B_t, h_dtype)  # [B_t, N, D]
    x_new = x_new_dot = None
    if update is not None:
        # [1, 1, 1] or [B, N, D]
        x_new = torch.empty((1, 1, 1), device=x.device, dtype=x_dtype) if defer else new(B, x_dtype)
        x_new_dot = None if B_t is None else new(B_t, x_dtype)  # [B_t, N, D]
    stats = torch.empty((B, N, 2), device=x.device, dtype=torch.float32)  # [B, N, mean and rstd]
    if h.numel():
        launch = forward_launch(
            x.contiguous(),
            contiguous_update(update),
            contiguous_update(base),
            shift,
            scale,
            dots._replace(x=contiguous(dots.x), y=contiguous(dots.y)),
            x_new,
            h,
            x_new_dot,
            h_dot,
            stats,
            eps=eps,
        )
        launch.run()
    return x_new.expand(B, N, D) if x_new is not None and defer else x_new, h, x_new_dot, h_dot, stats


def contiguous_update(update: Update | None) -> Update | None:
    return None if update is None else Update(update.y.contiguous(), update.gate, contiguous(update.bias))


def backward_launch(
    dh: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    update: Update | None,
    scale: Tensor,
    stats: Tensor,
    dx: Tensor,
    dy: Tensor | None,
    partials: Tensor,
    *,
    deferred: bool,
    config: Mapping[str, int],
) -> Launch:
    """The launch that fills dx, dy and partials [2, 3 or 4, B, chunks of config["CHUNK"] tokens, D]."""
    B, N, D = x.shape
    chunks = partials.shape[2]
    gate, stride_gate = per_sample(None if update is None else update.gate)
    scale_, stride_scale = per_sample(scale)
    return Launch(
        _ada_layer_norm_backward_kernel,
        lambda config: (B * chunks,),
        config,
        x.device,
        dh_ptr=dh,
        dx_new_ptr=dx_new,
        x_ptr=x,
        y_ptr=None if update is None else update.y,
        gate_ptr=gate,
        bias_ptr=None if update is None else update.bias,
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
        HAS_RESIDUAL=update is not None,
        DEFERRED=deferred,
    )


@planned
def norm_backward(
    dh: Tensor,
    dx_new: Tensor | None,
    x: Tensor,
    update: Update | None,
    scale: Tensor,
    stats: Tensor,
    *,
    deferred: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """dx and dy [B, N, D], [dshift, dscale and dgate] stacked as [2 or 3, B, D], and dbias [D].

    `x` is what was normed; `deferred`: what was updated by `update`. dy and dgate only with `update`, dbias with its.
    """
    B, N, D = x.shape
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)  # [B, N, D]
    dy, bias = None, None
    update = contiguous_update(update)
    if update is not None:
        dy, bias = torch.empty(update.y.shape, device=x.device, dtype=update.y.dtype), update.bias  # [B, N, D], [D]
    planes = 2 if update is None else 3
    if dx.numel() == 0:
        nothing = torch.zeros((planes, B, D), device=scale.device, dtype=scale.dtype)
        return dx, dy, nothing, None if bias is None else torch.zeros_like(bias)
    config = launch_config("ada_layer_norm_backward", x.device, x.dtype, width=D)
    config = with_fitting_chunk(config, x.device, B, N)
    chunks = cdiv(N, config["CHUNK"])
    dtype = scale.dtype if chunks == 1 and bias is None else torch.float32
    # [planes and dbias, B, chunks, D]
    partials = torch.empty((planes + (bias is not None), B, chunks, D), device=scale.device, dtype=dtype)
    launch = backward_launch(
        dh.contiguous(),
        contiguous(dx_new),
        x.contiguous(),
        update,
        scale,
        stats,
        dx,
        dy,
        partials,
        deferred=deferred,
        config=config,
    )
    launch.run()
    modulation = partials[:planes]
    if dtype != scale.dtype or chunks > 1:
        modulation = sum_partials(modulation.view(planes * B, chunks, D), scale.dtype)  # [planes·B, D]
    dbias = None if bias is None else sum_partials(partials[3].view(1, B * chunks, D), bias.dtype).view(D)  # [D]
    return dx, dy, modulation.view(planes, B, D), dbias
