"""Jumps of a flow map: MeanFlow sampling, in one or a few evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from ..options import option
from ..registry import register
from .gamma import Rule, sample_gamma
from .sampler import GuidableSteps, Interval, Start, Steps, Velocity, check_inputs, started
from .schedules import schedule_of


@torch.no_grad()
def sample(
    net: Callable[..., Any],
    noise: Tensor,
    y: Tensor,
    *,
    steps: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    start: Start = "unit",
    guidance_scale: float = 1.0,
    guidance_interval: Interval = (0.0, 1.0),
    **conditions: Any,
) -> Tensor:
    """MeanFlow sampling, z_r = z_t − (t − r)·u(z_t, r, t) (arXiv 2505.13447, Algorithm 2): `steps` network evaluations.

    Also the sampling of Shortcut models (arXiv 2410.12557), IMM's pushforward (arXiv 2503.07565), CTM's exact sampling
    (arXiv 2310.02279), and one-step sampling of whatever has a flow map.

    Args:
        net: u = net(z, r, t, y, **conditions), or a tuple whose first entry is u (`IMFDiT`).
        noise: (B, C, H, W) standard normal noise, the state at the first time.
        y: (B,) integer labels; the network's `num_classes` means "no label".
        steps: number of equal steps from t = 1 to 0; 1, the default, is one-step generation.
        times: the schedule instead of `steps`, never increasing, such as [1, 0.5, 0] or `karras_times(4, 0.994)`.
        start: what the noise is multiplied by for the state at the first time. "unit": 1; "scaled": that time, as
            consistency models start; "sphere": √(t² + (1 − t)²), noise of variance 1 at an angle of TrigFlow.
        guidance_scale: classifier-free guidance u_null + scale·(u_label − u_null) (arXiv 2207.12598); 1 is none. It
            doubles the rows of each evaluation.
        guidance_interval: closed interval of times t of the evaluations that are guided (arXiv 2404.07724).
        **conditions: passed to `net`, for instance omega=, t_min= and t_max= (numbers) for `IMFDiT`.

    Returns:
        (B, C, H, W), the state at the last time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_inputs(net, noise, y)
    schedule = schedule_of(steps, times, 1)
    u = Velocity(net, y, guidance_scale, guidance_interval, conditions)
    z = started(noise, schedule[0], start)
    for now, after in itertools.pairwise(schedule):
        z = z - (now - after) * u(z, now, after)  # [B, C, H, W]
    return z


@register("samplers", "jumps")
@dataclass(frozen=True)
class FewSteps(GuidableSteps):
    """Steps of a flow map, `sample`."""

    def draw(
        self, net: Callable[..., Any], noise: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `sample`; nothing is random."""
        return sample(net, noise, y, **self.arguments())

    def __str__(self) -> str:
        return f"flow map, {self.words()}{self.guidance_words()}"


@register("samplers", "guided")
@dataclass(frozen=True)
class GuidedSteps(Steps):
    """Steps of a flow map that takes its guidance as a condition, such as improved MeanFlow's.

    Args:
        omega: guidance scale, 1 is none
        t_min: guided times, from
        t_max: guided times, to
        gamma: share of the noise that is drawn anew between steps: 0 none, 1 all (as the gamma sampler's)
        rule: how (as the gamma sampler's)
    """

    sweep: ClassVar[tuple[str, tuple[float, ...]] | None] = ("omega", (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))
    keywords: ClassVar[tuple[str, ...]] = ("omega", "t_min", "t_max", "heads")

    omega: float = option(2.0, low=1.0)
    t_min: float = option(0.0, low=0.0, high=1.0)
    t_max: float = option(1.0, low=0.0, high=1.0)
    gamma: float = option(0.0, low=0.0, high=1.0)
    rule: Rule = "noise_level"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min > self.t_max:
            raise UsageError(f"expected at most t_max = {self.t_max}, got {self.t_min}", field="t_min")

    def conditions(self) -> dict[str, Any]:
        """What the network is called with besides z, r, t and y: the u head alone."""
        return {"omega": self.omega, "t_min": self.t_min, "t_max": self.t_max, "heads": "u"}

    def draw(
        self, net: Callable[..., Any], noise: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `sample`, or as `sample_gamma` with a gamma."""
        if self.gamma == 0.0:
            return sample(net, noise, y, **self.arguments(), **self.conditions())
        gamma: dict[str, Any] = {"gamma": self.gamma, "rule": self.rule, "generator": generator}
        return sample_gamma(net, noise, y, **self.arguments(), **gamma, **self.conditions())

    def __str__(self) -> str:
        gamma = f", gamma {self.gamma:g} by {self.rule}" if self.gamma else ""
        return f"flow map, {self.words()}{gamma}, omega {self.omega:g} on [{self.t_min:g}, {self.t_max:g}]"
