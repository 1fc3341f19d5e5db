"""What the row-wise Triton kernels share: a row of D columns is one power-of-two block, masked, in float32.

Rows are those of contiguous tensors, so that D, a compile-time constant, gives the alignment of loads (rows of 2730
columns of bfloat16 are aligned to 4 bytes, of 1152 to 16). Row numbers are int64: B·N·D exceeds 2^31 in ordinary
training.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, launch_config, next_power_of_2


def block_of(width: int) -> int:
    """Columns of the block that holds a row: the next power of two, and not less than one warp's worth."""
    return max(32, next_power_of_2(width))


def per_sample(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A (B, D) tensor whose rows are contiguous (a chunk of a wider one stays a view), and its batch stride."""
    if x is None:
        return None, 0
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x, x.stride(0)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def load_rows(ptr, rows, mask_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (int64) of a contiguous [·, D] tensor as float32; what lies past a mask reads as zero."""
    cols = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    ptrs = ptr + (rows[:, None] * D + cols[None, :])  # [ROWS, BLOCK_D]
    mask = mask_rows[:, None]  # [ROWS, 1]
    if BLOCK_D > D:
        mask = mask & (cols[None, :] < D)  # [ROWS, BLOCK_D]
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, rows, mask_rows, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = mask_rows[:, None]  # [ROWS, 1]
    if BLOCK_D > D:
        mask = mask & (cols[None, :] < D)  # [ROWS, BLOCK_D]
    tl.store(ptr + (rows[:, None] * D + cols[None, :]), tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_row(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row as [1, BLOCK_D] in float32, to be broadcast over a tile."""
    cols = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    return tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_row(ptr, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`row` is [BLOCK_D]."""
    cols = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    tl.store(ptr + cols, row.to(ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def zero_past(tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile with zeros in the columns past D, so that sums over a row see D columns."""
    if BLOCK_D > D:
        tile = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], tile, 0.0)
    return tile


@triton.jit
def tanh(x):
    """libdevice's tanh does not run in the interpreter. Near zero the absolute error is float32's, 1e-7."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


# ---------------------------------------------------------------------------------------------- sums without atomics


@triton.jit
def _sum_partials_kernel(
    partials_ptr,
    out_ptr,
    S,
    D,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partials [G, S, D] float32 summed over S, always in the same order; one program a group and block of columns."""
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    rows = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)  # [BLOCK_S, BLOCK_D]
    for start in range(0, S, BLOCK_S):
        ptrs = partials_ptr + (group * S + start + rows[:, None]) * D + cols[None, :]  # [BLOCK_S, BLOCK_D]
        mask = (start + rows[:, None] < S) & (cols[None, :] < D)  # [BLOCK_S, BLOCK_D]
        total += tl.load(ptrs, mask=mask, other=0.0)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)  # [BLOCK_D]
    tl.store(out_ptr + group * D + cols, out, mask=cols < D)


def sum_partials_launch(partials: Tensor, out: Tensor, config=None) -> Launch:
    G, S, D = partials.shape
    return Launch(
        _sum_partials_kernel,
        lambda config: (G, cdiv(D, config["BLOCK_D"])),
        config or launch_config("sum_partials", out.device, out.dtype, parts=S),
        out.device,
        partials_ptr=partials,
        out_ptr=out,
        S=S,
        D=D,
    )


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, D] in `dtype`: float32 partial sums [G, S, D], contiguous, added over S."""
    G, _, D = partials.shape
    out = torch.empty((G, D), device=partials.device, dtype=dtype)  # [G, D]
    if out.numel():
        sum_partials_launch(partials, out).run()
    return out
