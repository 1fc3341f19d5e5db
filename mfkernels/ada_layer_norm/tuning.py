"""What `python -m mfkernels.tune` measures of ada_layer_norm, in its form with the update before it."""

from __future__ import annotations

from collections.abc import Iterator

from ..gated_residual import gated_residual_ada_layer_norm
from ..tune_problems import TOKEN_ROWS, Problem, Sizes

OPS = ("ada_layer_norm_forward", "ada_layer_norm_backward")


def problems(sizes: Sizes) -> Iterator[Problem]:
    source, fused = sizes.source(), gated_residual_ada_layer_norm
    for width, bounds in sizes.each_width():
        x, y = (source.dual(sizes.batch, sizes.sequence, width) for _ in range(2))  # [B, N, D]
        operands = (x, y, *(source.dual(sizes.batch, width) for _ in range(3)))  # [B, D]
        yield source.problem("ada_layer_norm_forward", bounds, TOKEN_ROWS, fused, *operands)
        primals = [a.primal.clone() for a in operands]
        yield source.backward_problem("ada_layer_norm_backward", bounds, TOKEN_ROWS, fused, *primals)
