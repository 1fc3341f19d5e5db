"""Flow matching (arXiv 2210.02747): the velocity at one time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_velocity
from ..options import choice, option
from ..registry import register
from ..sampling import OdeSteps, Sampling, sampler_option
from .objective import Networks, Objective, Terms, check_time_sampler
from .rows import Net, Rows
from .time_samplers import LogitNormal, TimeSampler
from .weights import adaptive_error


@register("objectives", "flow_matching")
@dataclass(frozen=True)
class FlowMatching(Objective):
    """Flow matching: u(z, t, t, y) is trained towards v = e − x (arXiv 2210.02747); MeanFlow with r = t everywhere.

    Args:
        label_dropout: share of samples trained without their label, in [0, 1]
        norm_p: power of the adaptive weight; 0 is plain squared error (summed over pixels)
        norm_eps: epsilon of the adaptive weight
        time_sampler: how times are drawn
        sampling: how images are drawn

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    paper = ("2210.02747",)
    formula = "u(z, t, t) → v"
    ratio = 0.0

    label_dropout: float = option(0.1, low=0.0, high=1.0)
    norm_p: float = option(0.0, low=0.0)
    norm_eps: float = option(0.01, low=0.0, above=True)
    time_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(0.0, 1.0), prefix="time_")
    sampling: Sampling = sampler_option(OdeSteps)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time_sampler(self.time_sampler)

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """One time per sample, (n,), twice."""
        t = self.time_sampler.sample(n, generator=generator, device=device)  # [B]
        return t, t

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """‖u(z, t, t) − v‖²."""
        u = check_velocity("u", b.net(b.z, b.t, b.t, b.y), b.z)  # [B, …]
        error = adaptive_error(u, b.v, b, norm_p=self.norm_p, norm_eps=self.norm_eps)
        return Terms(error.per_sample, {"squared_error": error.squared_error}, u, None, b.v)

    def loss_at(  # type: ignore[override]
        self, net: Net, *, x: Tensor, noise: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None
    ) -> Any:
        """The loss at given draws; arguments as `MeanFlow.loss_at`, r = t."""
        return super().loss_at(net, x=x, noise=noise, t=t, r=t, y=y, drop=drop)
