"""How the two times of a training sample are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..options import Options, option
from ..registry import register
from .pairs import cumulative_normal


class TimeSampler(Protocol):
    """Draws n independent times in (0, 1)."""

    def sample(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor: ...


@register("time_samplers", "uniform")
@dataclass(frozen=True)
class Uniform(Options):
    """t ~ U(0, 1)."""

    def sample(self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """n float32 times, (n,)."""
        return torch.rand(n, generator=generator, device=device)

    def below(self, t: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One time below each of t (n,), as `sample` draws them, (n,)."""
        return t * torch.rand(t.shape, generator=generator, device=t.device)


@register("time_samplers", "logit_normal")
@dataclass(frozen=True)
class LogitNormal(Options):
    """logit(t) ~ N(mean, std²) (arXiv 2403.03206, §3.1; MeanFlow's default is mean −0.4, std 1).

    Args:
        mean: of logit(t)
        std: of logit(t)

    Raises:
        ValueError: the mean is not finite, or std not positive.
    """

    mean: float = -0.4
    std: float = option(1.0, low=0.0, above=True)

    def sample(self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """n float32 times, (n,)."""
        return self.of(torch.randn(n, generator=generator, device=device))

    def below(self, t: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """One time below each of t (n,), as `sample` draws them, (n,): by the inverse of their distribution."""
        largest = cumulative_normal((torch.logit(t.double()) - self.mean) / self.std)  # [n]
        share = largest * torch.rand(t.shape, generator=generator, device=t.device, dtype=torch.float64)  # [n]
        return torch.minimum(self.of(torch.special.ndtri(share)).to(t.dtype), t)

    def of(self, normal: Tensor) -> Tensor:
        """Times of standard normal numbers, (n,) of (n,)."""
        return torch.sigmoid(self.mean + self.std * normal)
