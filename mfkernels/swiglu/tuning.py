"""What `python -m mfkernels.tune` measures of swiglu."""

from __future__ import annotations

from collections.abc import Iterator

from ..tune_problems import Problem, Sizes, grid
from .op import swiglu

OPS = ("swiglu",)
CANDIDATES = grid(BLOCK_R=(1, 2, 4, 8), BLOCK_D=(256, 512, 1024), num_warps=(4, 8))


def problems(sizes: Sizes) -> Iterator[Problem]:
    source = sizes.source()
    for width, bounds in sizes.each_hidden_width():
        a, b = (source.dual(sizes.batch, sizes.sequence, width) for _ in range(2))  # [B, N, H]
        yield source.problem("swiglu", bounds, CANDIDATES, swiglu, a, b)
