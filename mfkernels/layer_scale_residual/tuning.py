"""What `python -m mfkernels.tune` measures of layer_scale_residual."""

from __future__ import annotations

from collections.abc import Iterator

from ..tune_problems import ROWS, ROWS_AND_SUMS, Problem, Sizes
from .op import layer_scale_residual

OPS = ("layer_scale_residual_forward", "layer_scale_residual_backward")


def problems(sizes: Sizes) -> Iterator[Problem]:
    source = sizes.source()
    for width, bounds in sizes.each_width():
        x, y = (source.dual(sizes.batch, sizes.sequence, width) for _ in range(2))  # [B, N, D]
        scale = source.tensor(width)  # [D]
        yield source.problem("layer_scale_residual_forward", bounds, ROWS, layer_scale_residual, x, y, scale)
        inputs = x.primal.clone(), y.primal.clone(), scale.clone()
        yield source.backward_problem(
            "layer_scale_residual_backward", bounds, ROWS_AND_SUMS, layer_scale_residual, *inputs
        )
