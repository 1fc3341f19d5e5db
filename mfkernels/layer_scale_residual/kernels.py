"""Triton layer-scale residual: output and tangent in one launch; in the backward dscale is a sum of partial sums."""

# mypy: allow-untyped-defs

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, launch_config
from ..plan import planned
from ..rms_norm.kernels import flat_rows, partial_sums
from ..rowwise import block_of, load_row, load_rows, store_row, store_rows, sum_partials


@triton.jit
def _layer_scale_residual_forward_kernel(
    x_ptr,  # [R, D]
    y_ptr,  # [R, D]
    x_dot_ptr,  # [R_t, D] or None
    y_dot_ptr,  # [R_t, D] or None
    scale_ptr,  # [D]
    out_ptr,  # [R, D]
    out_dot_ptr,  # [R_t, D] or None
    R,
    R_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    scale = load_row(scale_ptr, D, BLOCK_D)  # [1, BLOCK_D]
    x = load_rows(x_ptr, rows, rows < R, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
    y = load_rows(y_ptr, rows, rows < R, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
    if y_dot_ptr is not None:
        out_dot = load_rows(y_dot_ptr, rows, rows < R_t, D, BLOCK_D) * scale  # [BLOCK_R, BLOCK_D]
        if x_dot_ptr is not None:
            out_dot += load_rows(x_dot_ptr, rows, rows < R_t, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
        store_rows(out_dot_ptr, rows, rows < R_t, out_dot, D, BLOCK_D)
    store_rows(out_ptr, rows, rows < R, x + y * scale, D, BLOCK_D)


@triton.jit
def _layer_scale_residual_backward_kernel(
    dout_ptr,  # [R, D]
    y_ptr,  # [R, D]
    scale_ptr,  # [D]
    dy_ptr,  # [R, D]
    partials_ptr,  # [PARTS or fewer, D] float32
    R,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    part = tl.program_id(0)
    scale = load_row(scale_ptr, D, BLOCK_D)  # [1, BLOCK_D]
    dscale = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)  # [BLOCK_R, BLOCK_D]
    for block in range(part, tl.cdiv(R, BLOCK_R), PARTS):
        rows = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        dout = load_rows(dout_ptr, rows, rows < R, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
        y = load_rows(y_ptr, rows, rows < R, D, BLOCK_D)  # [BLOCK_R, BLOCK_D]
        store_rows(dy_ptr, rows, rows < R, dout * scale, D, BLOCK_D)
        dscale += dout * y  # [BLOCK_R, BLOCK_D]
    store_row(partials_ptr + part.to(tl.int64) * D, tl.sum(dscale, 0), D, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------- launchers


def forward_launch(
    x: Tensor,
    y: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    scale: Tensor,
    out: Tensor,
    out_dot: Tensor | None,
    *,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills out and out_dot; all contiguous, (R, D) and the first (R_t, D)."""
    R, D = x.shape
    return Launch(
        _layer_scale_residual_forward_kernel,
        lambda config: (cdiv(R, config["BLOCK_R"]),),
        config or launch_config("layer_scale_residual_forward", x.device, out.dtype, width=D),
        x.device,
        x_ptr=x,
        y_ptr=y,
        x_dot_ptr=x_dot,
        y_dot_ptr=y_dot,
        scale_ptr=scale,
        out_ptr=out,
        out_dot_ptr=out_dot,
        R=R,
        R_t=0 if out_dot is None else out_dot.shape[0],
        D=D,
        BLOCK_D=block_of(D),
    )


def backward_launch(
    dout: Tensor,
    y: Tensor,
    scale: Tensor,
    dy: Tensor,
    partials: Tensor,
    *,
    config: Mapping[str, int],
) -> Launch:
    """The launch that fills dy and the partial sums of dscale, one row a program."""
    R, D = y.shape
    return Launch(
        _layer_scale_residual_backward_kernel,
        lambda config: (partials.shape[0],),
        config,
        y.device,
        dout_ptr=dout,
        y_ptr=y,
        scale_ptr=scale,
        dy_ptr=dy,
        partials_ptr=partials,
        R=R,
        D=D,
        BLOCK_D=block_of(D),
    )


@planned
def layer_scale_residual_forward(
    x: Tensor,
    y: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    scale: Tensor,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """x + scale·y and its tangent, contiguous, in `dtype`.

    The tangents have the same first rows of the batch; without a y_dot there is none: it would be x_dot itself.
    """
    out = torch.empty(x.shape, device=x.device, dtype=dtype)  # [B, …, D]
    out_dot = None if y_dot is None else torch.empty(y_dot.shape, device=x.device, dtype=dtype)  # [B_t, …, D]
    if out.numel() == 0:
        return out, out_dot
    dual = y_dot is not None and y_dot.numel() > 0
    launch = forward_launch(
        flat_rows(x),
        flat_rows(y),
        flat_rows(x_dot) if dual else None,
        flat_rows(y_dot) if dual else None,
        scale.contiguous(),
        out.flatten(0, -2),
        flat_rows(out_dot) if dual else None,
    )
    launch.run()
    return out, out_dot


@planned
def layer_scale_residual_backward(dout: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dy, contiguous, in the dtype of y, and dscale in that of the scale."""
    dy = torch.empty(y.shape, device=y.device, dtype=y.dtype)  # [B, …, D]
    if dy.numel() == 0:
        return dy, torch.zeros_like(scale)
    config, partials = partial_sums("layer_scale_residual_backward", y)  # [parts, D]
    launch = backward_launch(
        flat_rows(dout),
        flat_rows(y),
        scale.contiguous(),
        dy.flatten(0, -2),
        partials,
        config=config,
    )
    launch.run()
    return dy, sum_partials(partials[None], scale.dtype)[0]
