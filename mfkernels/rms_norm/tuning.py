"""What `python -m mfkernels.tune` measures of rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

from ..tune_problems import ROWS, ROWS_AND_SUMS, Problem, Sizes
from .op import rms_norm

OPS = ("rms_norm_forward", "rms_norm_backward")


def problems(sizes: Sizes) -> Iterator[Problem]:
    source = sizes.source()
    for width, bounds in sizes.each_width():
        x, weight = source.dual(sizes.batch, sizes.sequence, width), source.tensor(width)  # [B, N, D], [D]
        yield source.problem("rms_norm_forward", bounds, ROWS, rms_norm, x, weight)
        inputs = x.primal.clone(), weight.clone()
        yield source.backward_problem("rms_norm_backward", bounds, ROWS_AND_SUMS, rms_norm, *inputs)
