"""What `python -m mfkernels.tune` measures of gated_residual; of its form with a norm, ada_layer_norm's."""

from __future__ import annotations

from collections.abc import Iterator

from ..tune_problems import TOKEN_ROWS, Problem, Sizes
from .op import gated_residual

OPS = ("gated_residual_forward", "gated_residual_backward")


def problems(sizes: Sizes) -> Iterator[Problem]:
    source = sizes.source()
    for width, bounds in sizes.each_width():
        x, y = (source.dual(sizes.batch, sizes.sequence, width) for _ in range(2))  # [B, N, D]
        operands = (x, y, source.dual(sizes.batch, width))  # the last [B, D]
        yield source.problem("gated_residual_forward", bounds, TOKEN_ROWS, gated_residual, *operands)
        primals = [a.primal.clone() for a in operands]
        yield source.backward_problem("gated_residual_backward", bounds, TOKEN_ROWS, gated_residual, *primals)
