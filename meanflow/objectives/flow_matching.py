"""Flow matching (arXiv 2210.02747): the velocity at one time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_velocity
from ..options import choice, group, option
from ..registry import register
from ..sampling import OdeSteps, Sampling, sampler_option
from .arguments import check_time_sampler
from .controls import Control, Controlled
from .objective import Networks, Terms
from .rows import Net, Rows
from .time_samplers import LogitNormal, TimeSampler
from .velocities import TargetVelocity, velocity_option
from .weights import adaptive_error


@register("objectives", "flow_matching")
@dataclass(frozen=True)
class FlowMatching(Controlled):
    """Flow matching: u(z, t, t, y) is trained towards v = e − x (arXiv 2210.02747); MeanFlow with r = t everywhere.

    Args:
        label_dropout: share of samples trained without their label, in [0, 1]
        norm_p: power of the adaptive weight; 0 is plain squared error (summed over pixels)
        norm_eps: epsilon of the adaptive weight
        time_sampler: how times are drawn
        velocity: what the target starts from: that of data and noise, a teacher's, or an average
        sampling: how images are drawn
        bridge: sigma of a Brownian bridge's noise added to the path; 0 is the linear path
        bridge_end: length of the times at both ends in which that noise falls linearly, so that velocities are finite
        control: penalties on the network's Jacobian: flag --control-lipschitz

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
    velocity: TargetVelocity = velocity_option()
    sampling: Sampling = sampler_option(OdeSteps)
    bridge: float = option(0.0, low=0.0)
    bridge_end: float = option(0.01, low=0.0, high=0.5, above=True)
    control: Control = group(Control, prefix="control_")

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

    def loss_at(
        self,
        net: Net,
        *,
        x: Tensor,
        noise: Tensor,
        t: Tensor,
        y: Tensor,
        drop: Tensor | None = None,
        nets: Networks | None = None,
        **conditions: Tensor,
    ) -> Any:
        """The loss at given draws; arguments as `MeanFlow.loss_at`, r = t."""
        return super().loss_at(net, x=x, noise=noise, t=t, r=t, y=y, drop=drop, nets=nets, **conditions)
