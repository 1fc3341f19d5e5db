"""What attention's Triton kernels share: a head as a tuple of tiles, (main,) or (main, tail), and how it is addressed.

The helpers are named as in csrc/attention/forward_kernel.cuh.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfkernels.launch import next_power_of_2


@triton.jit
def rows_of(ptr, batch, head, row, stride_b, stride_n, stride_h, ALIGN: tl.constexpr):
    """(pointer, stride) of one head's rows, from `row` on; () without a tensor. Strides given count ALIGN elements."""
    if ptr is None:
        return ()
    else:
        stride = stride_n * ALIGN
        return ptr + ((batch * stride_b + head * stride_h) * ALIGN + row * stride), stride


@triton.jit
def load_tile(source, first, rows, num_rows, D, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Columns FIRST .. FIRST + WIDTH from row `first` on; what lies past num_rows or past D reads as zero."""
    cols = FIRST + tl.arange(0, WIDTH)  # [WIDTH]
    ptrs = source[0] + first * source[1] + (rows[:, None] * source[1] + cols[None, :])  # [ROWS, WIDTH]
    if MASK_ROWS and FIRST + WIDTH > D:
        return tl.load(ptrs, mask=(rows[:, None] < num_rows) & (cols[None, :] < D), other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None] < num_rows, other=0.0)
    elif FIRST + WIDTH > D:
        return tl.load(ptrs, mask=cols[None, :] < D, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load(source, first, rows, num_rows, D, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, MASK_ROWS: tl.constexpr):
    """The tiles of the rows from row `first` on."""
    tiles = (load_tile(source, first, rows, num_rows, D, 0, D_MAIN, MASK_ROWS),)
    if D_TAIL > 0:
        tiles = tiles + (load_tile(source, first, rows, num_rows, D, D_MAIN, D_TAIL, MASK_ROWS),)
    return tiles


@triton.jit
def store(ptr, stride, rows, num_rows, tiles, D: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        cols = i * tiles[0].shape[1] + tl.arange(0, tiles[i].shape[1])  # [WIDTH]
        mask = rows[:, None] < num_rows  # [ROWS, 1]
        if i * tiles[0].shape[1] + tiles[i].shape[1] > D:
            mask = mask & (cols[None, :] < D)  # [ROWS, WIDTH]
        tl.store(ptr + rows[:, None] * stride + cols[None, :], tiles[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zeros_like(tiles):
    """Accumulators of the tiles' shapes."""
    zeros = ()
    for i in tl.static_range(len(tiles)):
        zeros = zeros + (tl.zeros(tiles[i].shape, tl.float32),)
    return zeros


@triton.jit
def rescale(tiles, factor):
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * factor,)
    return scaled


@triton.jit
def score(s, q, k, PRECISION: tl.constexpr):
    """s + q kᵀ"""
    for i in tl.static_range(len(q)):
        s = tl.dot(q[i], k[i].T, s, input_precision=PRECISION)
    return s


@triton.jit
def weigh(o, p, v, PRECISION: tl.constexpr):
    """o + p v"""
    weighted = ()
    for i in tl.static_range(len(v)):
        weighted = weighted + (tl.dot(p, v[i], o[i], input_precision=PRECISION),)
    return weighted


@triton.jit
def visible(s, offs_m, start_n, rows_n, left_n, CAUSAL: tl.constexpr, MASK_N: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N], -inf of keys that are absent or that the query does not see."""
    if MASK_N:
        s = tl.where(rows_n[None, :] < left_n, s, -float("inf"))
    if CAUSAL:
        s = tl.where(start_n + rows_n[None, :] <= offs_m[:, None], s, -float("inf"))
    return s


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
