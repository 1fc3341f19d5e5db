"""Triton RMSNorm: output and tangent in one launch; a backward whose weight gradient is a sum of partial sums."""

# mypy: allow-untyped-defs

from collections.abc import Mapping
from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, Launch, cdiv, launch_config
from ..plan import planned
from ..rowwise import block_of, load_row, load_rows, store_row, store_rows, sum_partials


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,  # [R, D]
    x_dot_ptr,  # [R_t, D] or None
    weight_ptr,  # [D]
    y_ptr,  # [R, D]
    y_dot_ptr,  # [R_t, D] or None
    eps,
    R,
    R_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    rows = first + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    x = load_rows(x_ptr, rows, rows < R, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
    if x_dot_ptr is not None:
        # before the sums of x, so that both loads are under way; past R_t it moves no memory
        x_dot = load_rows(x_dot_ptr, rows, rows < R_t, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
    weight = load_row(weight_ptr, D, BLOCK_D)  # [1, BLOCK_D]

    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)  # [BLOCK_R]
    x_hat = x * rstd[:, None]  # [BLOCK_R, BLOCK_D]
    store_rows(y_ptr, rows, rows < R, x_hat * weight, D, BLOCK_D)
    if x_dot_ptr is not None and first < R_t:
        mean = tl.sum(x_hat * x_dot, 1) / D  # [BLOCK_R]
        x_hat_dot = (x_dot - x_hat * mean[:, None]) * rstd[:, None]  # [BLOCK_R, BLOCK_D]
        store_rows(y_dot_ptr, rows, rows < R_t, x_hat_dot * weight, D, BLOCK_D)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,  # [R, D]
    x_ptr,  # [R, D]
    weight_ptr,  # [D]
    dx_ptr,  # [R, D]
    partials_ptr,  # [PARTS or fewer, D] float32
    eps,
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    part = tl.program_id(0)
    weight = load_row(weight_ptr, D, BLOCK_D)  # [1, BLOCK_D]
    dweight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)  # [BLOCK_R, BLOCK_D]
    for block in range(part, tl.cdiv(R, BLOCK_R), PARTS):
        rows = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        x = load_rows(x_ptr, rows, rows < R, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
        dy = load_rows(dy_ptr, rows, rows < R, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)  # [BLOCK_R]
        rstd = tl.where(rows < R, rstd, 0.0)  # [BLOCK_R] of absent rows it is infinite without eps, and inf * 0 is NaN
        x_hat = x * rstd[:, None]  # [BLOCK_R, BLOCK_D]
        dx_hat = dy * weight  # [BLOCK_R, BLOCK_D]
        mean = tl.sum(x_hat * dx_hat, 1) / D  # [BLOCK_R]
        store_rows(dx_ptr, rows, rows < R, (dx_hat - x_hat * mean[:, None]) * rstd[:, None], D, BLOCK_D)
        dweight += dy * x_hat  # [BLOCK_R, BLOCK_D]
    store_row(partials_ptr + part.to(tl.int64) * D, tl.sum(dweight, 0), D, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------- launchers


@overload
def flat_rows(x: Tensor) -> Tensor: ...
@overload
def flat_rows(x: None) -> None: ...
def flat_rows(x: Tensor | None) -> Tensor | None:
    """A (B, …, D) tensor as contiguous (R, D) rows; a copy only where it is not contiguous."""
    return None if x is None else x.contiguous().flatten(0, -2)


def partial_sums(op: str, x: Tensor) -> tuple[Config, Tensor]:
    """The configuration of a backward over the rows of `x`, and room for the sums that its programs leave."""
    D = x.shape[-1]
    config = launch_config(op, x.device, x.dtype, width=D)
    parts = min(cdiv(x.numel() // D, config["BLOCK_R"]), config["PARTS"])
    return config, torch.empty((parts, D), device=x.device, dtype=torch.float32)  # [parts, D]


def forward_launch(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    y: Tensor,
    y_dot: Tensor | None,
    *,
    eps: float,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills y and y_dot; all contiguous, (R, D) and the first (R_t, D)."""
    R, D = x.shape
    return Launch(
        _rms_norm_forward_kernel,
        lambda config: (cdiv(R, config["BLOCK_R"]),),
        config or launch_config("rms_norm_forward", x.device, x.dtype, width=D),
        x.device,
        x_ptr=x,
        x_dot_ptr=x_dot,
        weight_ptr=weight,
        y_ptr=y,
        y_dot_ptr=y_dot,
        eps=eps,
        R=R,
        R_t=0 if x_dot is None else x_dot.shape[0],
        D=D,
        BLOCK_D=block_of(D),
    )


def backward_launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor,
    partials: Tensor,
    *,
    eps: float,
    config: Mapping[str, int],
) -> Launch:
    """The launch that fills dx and the partial sums of dweight, one row a program."""
    R, D = x.shape
    return Launch(
        _rms_norm_backward_kernel,
        lambda config: (partials.shape[0],),
        config,
        x.device,
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        dx_ptr=dx,
        partials_ptr=partials,
        eps=eps,
        R=R,
        D=D,
        BLOCK_D=block_of(D),
    )


@planned
def rms_norm_forward(x: Tensor, x_dot: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor | None]:
    """y and its tangent (None without one), contiguous, in the dtype of x; x_dot has the first rows of the batch."""
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)  # [B, …, D]
    y_dot = None if x_dot is None else torch.empty(x_dot.shape, device=x.device, dtype=x.dtype)  # [B_t, …, D]
    if y.numel() == 0:
        return y, y_dot
    dual = x_dot is not None and x_dot.numel() > 0
    launch = forward_launch(
        flat_rows(x),
        flat_rows(x_dot) if dual else None,
        weight.contiguous(),
        y.flatten(0, -2),
        flat_rows(y_dot) if dual else None,
        eps=eps,
    )
    launch.run()
    return y, y_dot


@planned
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """dx, contiguous, in the dtype of x, and dweight in that of the weight."""
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)  # [B, …, D]
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight)
    config, partials = partial_sums("rms_norm_backward", x)  # [parts, D]
    launch = backward_launch(
        flat_rows(dy),
        flat_rows(x),
        weight.contiguous(),
        dx.flatten(0, -2),
        partials,
        eps=eps,
        config=config,
    )
    launch.run()
    return dx, sum_partials(partials[None], weight.dtype)[0]
