"""A solver along the velocity, the sampler of flow matching."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..options import option
from ..registry import register
from .sampler import MOST, GuidableSteps, Interval, Start, Velocity, check_inputs, started
from .schedules import schedule_of


@torch.no_grad()
def sample_ode(
    net: Callable[..., Tensor],
    noise: Tensor,
    y: Tensor,
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    method: Literal["euler", "heun"] = "heun",
    start: Start = "unit",
    guidance_scale: float = 1.0,
    guidance_interval: Interval = (0.0, 1.0),
    **conditions: Any,
) -> Tensor:
    """Integrate dz/dt = u(z, t, t) from noise to data, the sampler of flow matching (arXiv 2210.02747).

    Args:
        net, noise, y, times, start, guidance_scale, guidance_interval, **conditions: as in `sample`.
        steps: number of equal steps; default: 50.
        method: "euler" (one evaluation a step) or "heun" (two; second order, the explicit trapezoidal rule).

    Returns:
        (B, C, H, W), the state at the last time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_inputs(net, noise, y)
    if method not in ("euler", "heun"):
        raise ValueError(f"method: expected 'euler' or 'heun', got {method!r}")
    schedule = schedule_of(steps, times, 50)
    u = Velocity(net, y, guidance_scale, guidance_interval, conditions)
    z = started(noise, schedule[0], start)
    for now, after in itertools.pairwise(schedule):
        h = now - after
        v = u(z, now, now)  # [B, C, H, W]
        z_euler = z - h * v
        z = z_euler if method == "euler" else z - h / 2 * (v + u(z_euler, after, after))
    return z


@register("samplers", "ode")
@dataclass(frozen=True)
class OdeSteps(GuidableSteps):
    """An ODE solver along the velocity, `sample_ode`.

    Args:
        steps: of the ODE solver
        method: the ODE solver: euler has one network evaluation a step, heun two
    """

    steps: int = option(50, low=1, high=MOST)
    method: Literal["heun", "euler"] = "heun"

    def draw(
        self, net: Callable[..., Any], noise: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `sample_ode`; nothing is random."""
        return sample_ode(net, noise, y, method=self.method, **self.arguments())

    def __str__(self) -> str:
        steps = len(self.path()) - 1
        evaluations = self.words(2 if self.method == "heun" else 1)
        return f"{self.method.title()}'s method, {steps} steps, {evaluations}{self.guidance_words()}"
