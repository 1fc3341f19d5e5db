from __future__ import annotations

import torch

from ..backend import choose
from ..checks import check_operand
from ..dual import Dual, TensorOrDual
from . import reference


def timestep_embedding(t: TensorOrDual, dim: int, *, max_period: float = 10000.0) -> TensorOrDual:
    """Sinusoidal features of a scalar, [cos(tω), sin(tω)] (arXiv 1706.03762, §3.5, in DiT's order: cosines first).

    Tangent: ṫ·ω·[−sin(tω), cos(tω)].

    Args:
        t: (B,) times in any unit; MeanFlow uses [0, 1].
        dim: number of features, even.
        max_period: period of the slowest feature, > 1.

    Returns:
        (B, dim), of the kind and dtype of `t`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_operand("t", t, 1)
    if dim < 2 or dim % 2 != 0:
        raise ValueError(f"dim: expected an even number >= 2, got {dim}")
    if max_period <= 1:
        raise ValueError(f"max_period: expected a number > 1, got {max_period}")
    choose("timestep_embedding", t.device, {})
    if not isinstance(t, Dual):
        return reference.timestep_embedding(t, dim, max_period)
    y = reference.timestep_embedding(t.primal, dim, max_period)
    if t.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.timestep_embedding_tangent(t.primal[: t.rows], t.tangent, dim, max_period))
