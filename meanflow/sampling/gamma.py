"""γ-sampling: jumps beyond the next time, and noise back up to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mfkernels.checks import check_number

from ..options import option
from ..registry import register
from .renoise import Noises, renoise
from .sampler import MOST, GuidableSteps, Interval, Start, Velocity, check_inputs, started
from .schedules import schedule_of

Rule = Literal["noise_level", "time", "dmf"]


@torch.no_grad()
def sample_gamma(
    net: Callable[..., Any],
    noise: Tensor,
    y: Tensor,
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    gamma: float = 0.5,
    rule: Rule = "noise_level",
    start: Start = "unit",
    guidance_scale: float = 1.0,
    guidance_interval: Interval = (0.0, 1.0),
    generator: torch.Generator | None = None,
    noises: Sequence[Tensor] | None = None,
    **conditions: Any,
) -> Tensor:
    """γ-sampling (CTM, arXiv 2310.02279, Algorithm 3; AYF, arXiv 2506.14603).

    From each time but the last step's the flow map jumps to a time q between the next one t and the end, and fresh
    noise brings the state back from q to t. γ = 0 is `sample`, γ = 1 jumps to the end as `sample_consistency`.

    Args:
        net, noise, y, times, start, guidance_scale, guidance_interval, **conditions: as in `sample`.
        steps: number of equal steps; default: 2.
        gamma: γ in [0, 1].
        rule: "noise_level" (CTM): q has the noise level √(1 − γ²)(σ − σ_end) + σ_end, with σ = t/(1 − t) of the next
            time and σ_end of the last one of `times` (CTM's is 0.002). "time": q = √(1 − γ²)·t, and the noise is that
            of `renoise`. "dmf" (the authors' program of arXiv 2510.24474): the same q, and then a·z + (1 − a)·noise
            with a = (1 − t)/(1 − q), which has less noise than z_t where 0 < γ < 1.
        generator: source of the noises, on any device; default: PyTorch's global one.
        noises: the steps − 1 noises themselves, (B, C, H, W) each.

    Returns:
        (B, C, H, W), the state at the last time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_inputs(net, noise, y)
    check_number("gamma", gamma)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: expected a number in [0, 1], got {gamma}")
    if rule not in ("noise_level", "time", "dmf"):
        raise ValueError(f"rule: expected 'noise_level', 'time' or 'dmf', got {rule!r}")
    schedule = schedule_of(steps, times, 2)
    end = schedule[-1]
    u = Velocity(net, y, guidance_scale, guidance_interval, conditions)
    fresh = Noises(noise, len(schedule) - 2, generator, noises)
    z = started(noise, schedule[0], start)
    for i, (now, after) in enumerate(itertools.pairwise(schedule)):
        q = after if i == len(schedule) - 2 else _target(after, end, gamma, rule)
        z = z - (now - q) * u(z, now, q)  # [B, C, H, W]
        if q < after and rule == "dmf":
            a = (1 - after) / (1 - q)
            z = a * z + (1 - a) * fresh.next(z)
        elif q < after:
            z = renoise(z, q, after, fresh.next(z))
    return z


def _target(t: float, end: float, gamma: float, rule: Rule) -> float:
    """The time that is jumped to where t is the next one."""
    keep = (1 - gamma**2) ** 0.5
    if keep == 0.0 or t <= end:
        return end
    if keep == 1.0 or (t == 1.0 and rule == "noise_level"):
        return t
    if rule != "noise_level":
        return end + keep * (t - end)
    level, level_end = t / (1 - t), end / (1 - end)
    level = level_end + keep * (level - level_end)
    return level / (1 + level)


@register("samplers", "gamma")
@dataclass(frozen=True)
class GammaSteps(GuidableSteps):
    """Steps of a flow map with some of the noise drawn anew between them, `sample_gamma`.

    Args:
        gamma: share of the noise that is drawn anew: 0 is jumps, 1 is consistency
        rule: how. noise_level: as CTM; time: as CTM, the share counted in t; dmf: as the program of Decoupled MeanFlow
    """

    steps: int = option(2, low=1, high=MOST)
    gamma: float = option(0.5, low=0.0, high=1.0)
    rule: Rule = "noise_level"

    def draw(
        self, net: Callable[..., Any], noise: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `sample_gamma`."""
        return sample_gamma(net, noise, y, gamma=self.gamma, rule=self.rule, generator=generator, **self.arguments())

    def __str__(self) -> str:
        return f"gamma {self.gamma:g} by {self.rule}, {self.words()}{self.guidance_words()}"
