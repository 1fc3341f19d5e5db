"""Sampling of consistency models: to the data in one evaluation, noise back, and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfkernels.checks import check_number

from ..errors import UsageError
from ..options import option
from ..registry import register
from .renoise import Noises, renoise
from .sampler import MOST, GuidableSteps, Interval, Start, Velocity, check_inputs, started
from .schedules import schedule_of


@torch.no_grad()
def sample_consistency(
    net: Callable[..., Any],
    noise: Tensor,
    y: Tensor,
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    sigma_min: float = 0.0,
    clip: bool = False,
    start: Start = "unit",
    guidance_scale: float = 1.0,
    guidance_interval: Interval = (0.0, 1.0),
    generator: torch.Generator | None = None,
    noises: Sequence[Tensor] | None = None,
    **conditions: Any,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2303.01469, Algorithm 1); IMM's and DMF's "restart", sCM's and rCM's.

    From each time the flow map jumps to the last one of `times`, x̂ = z − t·u(z, 0, t), and fresh noise brings x̂ to the
    next time.

    Args:
        net, noise, y, start, guidance_scale, guidance_interval, **conditions: as in `sample`.
        steps: number of equal steps; default: 2.
        times: the times of the evaluations and the end, such as [1, 0.5, 0].
        sigma_min: noise level that x̂ has: the noise of the next level σ is then √(σ² − sigma_min²), as consistency
            models have it (0.002).
        clip: cut every x̂ to [−1, 1], as openai's program does.
        generator: source of the noises, on any device; default: PyTorch's global one.
        noises: the steps − 1 noises themselves, (B, C, H, W) each.

    Returns:
        (B, C, H, W), x̂ of the last evaluation.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_inputs(net, noise, y)
    schedule = schedule_of(steps, times, 2)
    least = _least(sigma_min, schedule)
    *evaluated, end = schedule
    u = Velocity(net, y, guidance_scale, guidance_interval, conditions)
    fresh = Noises(noise, len(evaluated) - 1, generator, noises)
    z = started(noise, schedule[0], start)
    for i, now in enumerate(evaluated):
        z = z - (now - end) * u(z, now, end)  # [B, C, H, W]
        if clip:
            z = z.clamp(-1.0, 1.0)
        if i < len(evaluated) - 1 and sigma_min > 0:
            z = renoise((1 - least) * z, least, evaluated[i + 1], fresh.next(z))
        elif i < len(evaluated) - 1 and evaluated[i + 1] > end:
            z = renoise(z, end, evaluated[i + 1], fresh.next(z))
    return z


def _least(sigma_min: float, schedule: Sequence[float]) -> float:
    """The time of the noise level sigma_min.

    Raises:
        ValueError: it does not fit the times.
    """
    check_number("sigma_min", sigma_min)
    if sigma_min < 0:
        raise ValueError(f"sigma_min: expected a number >= 0, got {sigma_min}")
    least = sigma_min / (1 + sigma_min)
    if sigma_min > 0 and schedule[-1] > 0:
        raise ValueError(f"sigma_min: expected 0 with times that end at {schedule[-1]:g}, got {sigma_min}")
    if len(schedule) > 2 and schedule[-2] < least:
        raise ValueError(
            f"sigma_min: expected at most {schedule[-2] / (1 - schedule[-2]):g}, the noise level of the last time "
            f"before the end, got {sigma_min}"
        )
    return least


@register("samplers", "consistency")
@dataclass(frozen=True)
class ConsistencySteps(GuidableSteps):
    """To the data in one evaluation, noise back, and again, `sample_consistency`.

    Args:
        sigma_min: noise level that is taken for that of a clean image, 0.002 in consistency models
        clip: cut every clean image to [-1, 1]
    """

    steps: int = option(2, low=1, high=MOST)
    sigma_min: float = option(0.0, low=0.0)
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _least(self.sigma_min, self.path())
        except ValueError as error:
            raise UsageError(str(error).removeprefix("sigma_min: "), field="sigma_min") from error

    def draw(
        self, net: Callable[..., Any], noise: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `sample_consistency`."""
        return sample_consistency(
            net, noise, y, sigma_min=self.sigma_min, clip=self.clip, generator=generator, **self.arguments()
        )

    def __str__(self) -> str:
        clipped = ", clipped" if self.clip else ""
        return f"consistency, {self.words()}{clipped}{self.guidance_words()}"
