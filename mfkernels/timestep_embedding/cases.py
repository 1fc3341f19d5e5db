"""What `python -m mfkernels.check` runs of timestep_embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..check.case import Case, OpCases, random
from .op import timestep_embedding


def frequencies(dim: int, max_period: float = 10000.0) -> Tensor:
    return max_period ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))  # [dim/2]


def sinusoids(t: Tensor, omega: Tensor) -> Tensor:
    wide = torch.promote_types(t.dtype, torch.float32)  # of the angles: in bfloat16 they would be off by whole radians
    angle = t.to(wide)[:, None] * omega.to(wide)  # [B, dim/2]
    return torch.cat((angle.cos(), angle.sin()), 1).to(t.dtype)  # [B, dim]


def make(B: int, dim: int) -> Case:
    return Case(
        f"B={B} dim={dim}",
        lambda generator: {"t": random(generator, B).sigmoid()},  # [B]
        ["t"],
        lambda t, omega: timestep_embedding(t, dim),
        sinusoids,
        constants={"omega": frequencies(dim)},  # [dim/2]
    )


CASES = {
    "timestep_embedding": OpCases(
        make, small=[make(1, 100), make(63, 256), make(100, 2730)], large=[], timed=(make(64, 256), make(256, 256))
    )
}
