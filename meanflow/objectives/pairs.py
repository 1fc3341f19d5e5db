"""How several times of a sample hang together: the grids of consistency models, and their curricula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# the time of the noise level 80, at which consistency models start
SIGMA_MAX = 80 / 81


def karras_levels(p: Tensor, *, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels σ at shares p in [0, 1] of the way from sigma_max to sigma_min, which is even in σ^(1/rho).

    With p = i/(N − 1) those of arXiv 2206.00364, eq. 5, the noisiest first.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + p * (low - high)) ** rho


def growing_scales(step: int, *, first: int, last: int, total: int) -> int:
    """N(k) − 1 intervals of consistency training after `step` of `total` steps (arXiv 2303.01469, appendix C)."""
    scales = math.sqrt(step / total * ((last + 1) ** 2 - first**2) + first**2)
    return max(1, math.ceil(scales - 1))


def doubling_scales(step: int, *, first: int, last: int, total: int) -> int:
    """N(k) of improved consistency training (arXiv 2310.14189, eq. 10): doubled in equal parts of the training."""
    every = total // (math.floor(math.log2(last // first)) + 1)
    return min(first * 2 ** (step // max(every, 1)), last) + 1


def cumulative_normal(a: Tensor) -> Tensor:
    """P(n ≤ a) of a standard normal n, of the shape of a."""
    return 0.5 * (1 + torch.erf(a / math.sqrt(2)))
