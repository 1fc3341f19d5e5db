"""What `python -m mfkernels.tune` measures of adaptive_squared_error: latents of 4 channels, four numbers a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..backend import use_backend
from ..tune_problems import Problem, Sizes, grid
from .op import adaptive_squared_error

OPS = ("adaptive_squared_error",)
CANDIDATES = grid(CHUNK=(4096, 8192, 16384), BLOCK=(1024, 2048), num_warps=(4, 8))


def problems(sizes: Sizes) -> Iterator[Problem]:
    source, B, side = sizes.source(), sizes.batch, 2 * round(sizes.sequence**0.5)
    u, v, correction = (source.tensor(B, 4, side, side) for _ in range(3))  # [B, C, H, W]
    interval = source.tensor(B).sigmoid()  # [B]
    u.requires_grad_()

    def step() -> Sequence[Tensor]:
        with use_backend("triton"):
            per_sample = adaptive_squared_error(u, v, correction, interval).per_sample
            return torch.autograd.grad(per_sample.mean(), u)

    yield Problem("adaptive_squared_error", {}, CANDIDATES, step)
