"""Stochastic sampling of a flow: the reverse-time SDE that has the flow's marginals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mfkernels.checks import check_number

from ..options import option
from ..registry import register
from .renoise import Noises
from .sampler import MOST, GuidableSteps, Interval, Start, Velocity, check_inputs, started
from .schedules import schedule_of

Diffusion = Literal["t", "sin2", "constant"]
_DIFFUSIONS: dict[str, Callable[[float], float]] = {
    "t": lambda t: t,
    "sin2": lambda t: math.sin(math.pi * t) ** 2,
    "constant": lambda t: 1.0,
}


@torch.no_grad()
def sample_sde(
    net: Callable[..., Any],
    noise: Tensor,
    y: Tensor,
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    diffusion: Diffusion | Callable[[float], float] = "t",
    diffusion_scale: float = 1.0,
    start: Start = "unit",
    guidance_scale: float = 1.0,
    guidance_interval: Interval = (0.0, 1.0),
    generator: torch.Generator | None = None,
    noises: Sequence[Tensor] | None = None,
    **conditions: Any,
) -> Tensor:
    """Euler–Maruyama steps of dz = v dt − ½w·score dt + √w dW̄ from t = 1 to 0 (SiT, arXiv 2401.08740, section 2).

    v = u(z, t, t), and score = −(z + (1 − t)·v)/t, as E[e|z] = z + (1 − t)·v. Every w(t) >= 0 has the marginals of the
    flow, w = 0 is the flow itself. The last step is deterministic, z − h·v: to t = 0 that is E[x|z]. (SiT's program
    writes w as 2·diffusion.)

    Args:
        net, noise, y, times, start, guidance_scale, guidance_interval, **conditions: as in `sample`.
        steps: number of equal steps; default: 250.
        diffusion: w(t) before the scale: "t", "sin2" (sin²(πt)), "constant" (1), or a function of t.
        diffusion_scale: factor of w; 0 is `sample_ode` with method="euler".
        generator: source of the noises, on any device; default: PyTorch's global one.
        noises: the steps − 1 noises themselves, (B, C, H, W) each.

    Returns:
        (B, C, H, W), the state at the last time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_inputs(net, noise, y)
    check_number("diffusion_scale", diffusion_scale)
    if diffusion_scale < 0:
        raise ValueError(f"diffusion_scale: expected a number >= 0, got {diffusion_scale}")
    if not callable(diffusion) and diffusion not in _DIFFUSIONS:
        raise ValueError(f"diffusion: expected a function or one of {', '.join(_DIFFUSIONS)}, got {diffusion!r}")
    w = diffusion if callable(diffusion) else _DIFFUSIONS[diffusion]
    schedule = schedule_of(steps, times, 250)
    u = Velocity(net, y, guidance_scale, guidance_interval, conditions)
    fresh = Noises(noise, len(schedule) - 2, generator, noises)
    z = started(noise, schedule[0], start)
    for i, (now, after) in enumerate(itertools.pairwise(schedule)):
        h = now - after
        v = u(z, now, now)  # [B, C, H, W]
        amount = diffusion_scale * w(now) if i < len(schedule) - 2 else 0.0
        if amount < 0:
            raise ValueError(f"diffusion: expected numbers >= 0, got {amount} at t = {now}")
        if amount == 0.0:
            z = z - h * v
        else:
            score = -(z + (1 - now) * v) / now  # [B, C, H, W]
            z = z - h * v + h / 2 * amount * score + (amount * h) ** 0.5 * fresh.next(z)
    return z


@register("samplers", "sde")
@dataclass(frozen=True)
class SdeSteps(GuidableSteps):
    """Stochastic sampling along the velocity, `sample_sde`.

    Args:
        diffusion: how much noise at which time: t, sin2 (sin^2(pi t)) or constant
        diffusion_scale: factor of it; 0 is the ode sampler with method euler
    """

    steps: int = option(250, low=1, high=MOST)
    diffusion: Diffusion = "t"
    diffusion_scale: float = option(1.0, low=0.0)

    def draw(
        self, net: Callable[..., Any], noise: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `sample_sde`."""
        more: dict[str, Any] = {"diffusion": self.diffusion, "diffusion_scale": self.diffusion_scale}
        return sample_sde(net, noise, y, generator=generator, **more, **self.arguments())

    def __str__(self) -> str:
        noise = f"diffusion {self.diffusion_scale:g}·{self.diffusion}"
        return f"Euler-Maruyama, {self.words()}, {noise}{self.guidance_words()}"
