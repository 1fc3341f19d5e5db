"""Triton SwiGLU gate: output and tangent in one launch, and its backward. Halves of one projection are read in place.

Where every operand is contiguous the tile is a piece of the flat memory, not of a row: rows of 2730 columns in bfloat16
start on 4 bytes and would load 4 at a time, flat memory loads 16.
"""

# mypy: allow-untyped-defs

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, launch_config
from ..plan import planned

FLAT_WIDTH = 256  # columns that flat memory is seen as; its configurations have blocks of as many


@triton.jit
def _tile(D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (int64, [BLOCK_R, 1]) and columns ([1, BLOCK_D]) of this program."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    cols = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    return rows[:, None], cols[None, :]


@triton.jit
def _inside(rows, cols, size, D: tl.constexpr, FLAT: tl.constexpr):
    """Which elements are among the first `size`; whole rows unless the memory is flat."""
    return rows * D + cols < size if FLAT else (rows * D < size) & (cols < D)


@triton.jit
def _swiglu_forward_kernel(
    a_ptr,  # [R, D], rows STRIDE_A apart; so are the others
    b_ptr,
    a_dot_ptr,  # [R_t, D] or None
    b_dot_ptr,  # [R_t, D] or None
    y_ptr,  # [R, D] contiguous
    y_dot_ptr,  # [R_t, D] contiguous or None
    size,  # R·D
    size_t,  # R_t·D
    D: tl.constexpr,
    STRIDE_A: tl.constexpr,
    STRIDE_B: tl.constexpr,
    STRIDE_A_DOT: tl.constexpr,
    STRIDE_B_DOT: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, cols = _tile(D, BLOCK_R, BLOCK_D)  # [BLOCK_R, 1], [1, BLOCK_D]
    mask = _inside(rows, cols, size, D, FLAT)  # [BLOCK_R, BLOCK_D]
    a = tl.load(a_ptr + (rows * STRIDE_A + cols), mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    b = tl.load(b_ptr + (rows * STRIDE_B + cols), mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    if y_dot_ptr is not None:
        # before the store of y, so that all loads are under way; past R_t they move no memory
        mask_t = _inside(rows, cols, size_t, D, FLAT)  # [BLOCK_R, BLOCK_D]
        if a_dot_ptr is not None:
            a_dot = tl.load(a_dot_ptr + (rows * STRIDE_A_DOT + cols), mask=mask_t, other=0.0).to(tl.float32)
        if b_dot_ptr is not None:
            b_dot = tl.load(b_dot_ptr + (rows * STRIDE_B_DOT + cols), mask=mask_t, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a)  # [BLOCK_R, BLOCK_D]
    silu = a * sigmoid  # [BLOCK_R, BLOCK_D]
    tl.store(y_ptr + (rows * D + cols), (silu * b).to(y_ptr.dtype.element_ty), mask=mask)
    if y_dot_ptr is not None:
        y_dot = tl.zeros_like(a)  # [BLOCK_R, BLOCK_D]
        if a_dot_ptr is not None:
            y_dot += a_dot * b * (sigmoid + silu * (1.0 - sigmoid))  # [BLOCK_R, BLOCK_D]
        if b_dot_ptr is not None:
            y_dot += silu * b_dot  # [BLOCK_R, BLOCK_D]
        tl.store(y_dot_ptr + (rows * D + cols), y_dot.to(y_dot_ptr.dtype.element_ty), mask=mask_t)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr,  # [R, D], rows STRIDE_DY apart; so are the others
    a_ptr,
    b_ptr,
    da_ptr,  # [R, D] contiguous
    db_ptr,  # [R, D] contiguous
    size,  # R·D
    D: tl.constexpr,
    STRIDE_DY: tl.constexpr,
    STRIDE_A: tl.constexpr,
    STRIDE_B: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, cols = _tile(D, BLOCK_R, BLOCK_D)  # [BLOCK_R, 1], [1, BLOCK_D]
    mask = _inside(rows, cols, size, D, FLAT)  # [BLOCK_R, BLOCK_D]
    dy = tl.load(dy_ptr + (rows * STRIDE_DY + cols), mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    a = tl.load(a_ptr + (rows * STRIDE_A + cols), mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    b = tl.load(b_ptr + (rows * STRIDE_B + cols), mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    sigmoid = tl.sigmoid(a)  # [BLOCK_R, BLOCK_D]
    silu = a * sigmoid  # [BLOCK_R, BLOCK_D]
    da = dy * b * (sigmoid + silu * (1.0 - sigmoid))  # [BLOCK_R, BLOCK_D]
    tl.store(da_ptr + (rows * D + cols), da.to(da_ptr.dtype.element_ty), mask=mask)
    tl.store(db_ptr + (rows * D + cols), (dy * silu).to(db_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------- launchers


def as_rows(x: Tensor) -> Tensor:
    """(R, D) with columns next to each other: a view where the rows lie evenly, else a copy."""
    rows = x.flatten(0, -2)  # [R, D]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _layout(*operands: Tensor | None) -> tuple[int, bool, list[int]]:
    """Columns, whether the memory is flat, and the row strides of (R, D) operands."""
    given = [x for x in operands if x is not None]
    if all(x.is_contiguous() for x in given):
        return FLAT_WIDTH, True, [FLAT_WIDTH] * len(operands)
    return given[0].shape[1], False, [0 if x is None else x.stride(0) for x in operands]


def _grid(size: int, D: int):
    rows = cdiv(size, D)
    return lambda config: (cdiv(rows, config["BLOCK_R"]) * cdiv(D, config["BLOCK_D"]),)


def forward_launch(
    a: Tensor,
    b: Tensor,
    a_dot: Tensor | None,
    b_dot: Tensor | None,
    y: Tensor,
    y_dot: Tensor | None,
    *,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills y and y_dot; inputs as `as_rows` leaves them, outputs contiguous."""
    D, flat, strides = _layout(a, b, a_dot, b_dot)
    return Launch(
        _swiglu_forward_kernel,
        _grid(y.numel(), D),
        config or launch_config("swiglu", a.device, a.dtype, width=D),
        a.device,
        a_ptr=a,
        b_ptr=b,
        a_dot_ptr=a_dot,
        b_dot_ptr=b_dot,
        y_ptr=y,
        y_dot_ptr=y_dot,
        size=y.numel(),
        size_t=0 if y_dot is None else y_dot.numel(),
        D=D,
        STRIDE_A=strides[0],
        STRIDE_B=strides[1],
        STRIDE_A_DOT=strides[2],
        STRIDE_B_DOT=strides[3],
        FLAT=flat,
    )


def backward_launch(
    dy: Tensor,
    a: Tensor,
    b: Tensor,
    da: Tensor,
    db: Tensor,
    *,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills da and db; inputs as `as_rows` leaves them, outputs contiguous."""
    D, flat, strides = _layout(dy, a, b)
    return Launch(
        _swiglu_backward_kernel,
        _grid(da.numel(), D),
        config or launch_config("swiglu", a.device, a.dtype, width=D),
        a.device,
        dy_ptr=dy,
        a_ptr=a,
        b_ptr=b,
        da_ptr=da,
        db_ptr=db,
        size=da.numel(),
        D=D,
        STRIDE_DY=strides[0],
        STRIDE_A=strides[1],
        STRIDE_B=strides[2],
        FLAT=flat,
    )


@planned
def swiglu_forward(
    a: Tensor,
    b: Tensor,
    a_dot: Tensor | None,
    b_dot: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """silu(a)∘b and its tangent (None without one), contiguous; tangents with the same first rows of the batch."""
    y = torch.empty(a.shape, device=a.device, dtype=torch.promote_types(a.dtype, b.dtype))  # [B, …, D]
    some_dot = b_dot if a_dot is None else a_dot
    y_dot = None if some_dot is None else torch.empty(some_dot.shape, device=a.device, dtype=y.dtype)  # [B_t, …, D]
    if y.numel() == 0:
        return y, y_dot
    dual = y_dot is not None and y_dot.numel() > 0
    launch = forward_launch(
        as_rows(a),
        as_rows(b),
        as_rows(a_dot) if dual and a_dot is not None else None,
        as_rows(b_dot) if dual and b_dot is not None else None,
        y,
        y_dot if dual else None,
    )
    launch.run()
    return y, y_dot


@planned
def swiglu_backward(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """da and db, contiguous."""
    da, db = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (a, b))  # [B, …, D]
    if da.numel():
        backward_launch(as_rows(dy), as_rows(a), as_rows(b), da, db).run()
    return da, db
