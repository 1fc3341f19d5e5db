"""What `python -m mfkernels.tune` measures of the activation between the products of mlp."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..tune_problems import Bounds, Problem, Sizes, Source, grid, tensors
from .kernels import gelu_backward, gelu_forward

OPS = ("gelu_forward", "gelu_backward")
GELU = grid(BLOCK_M=(1, 2, 4, 8), BLOCK_H=(256, 512, 1024), num_warps=(4, 8))
GELU_BACKWARD = grid(BLOCK_M=(2, 4, 8), BLOCK_H=(256, 512), CHUNK=(64, 128, 256), num_warps=(4, 8))


def problems(sizes: Sizes) -> Iterator[Problem]:
    source = sizes.source()
    for width, bounds in sizes.each_hidden_width():
        h, h_dot = (source.tensor(sizes.batch * sizes.sequence, width) for _ in range(2))  # [M, H]
        yield from _problems(width, h, h_dot, source, bounds)


def _problems(width: int, h: Tensor, h_dot: Tensor, source: Source, bounds: Bounds) -> Iterator[Problem]:
    da, bias = source.tensor(*h.shape), source.tensor(width)  # [M, H], [H]
    yield Problem("gelu_forward", bounds, GELU, lambda: tensors(gelu_forward(h, bias, h_dot)))
    yield Problem("gelu_backward", bounds, GELU_BACKWARD, lambda: tensors(gelu_backward(h, bias, da)))
