"""MeanFlow (arXiv 2505.13447), in the paper's letters.

z_t = (1 − t) x + t e,  v = e − x,  u_tgt = v − (t − r)·du/dt,  du/dt = (∂u/∂z)·v + ∂u/∂t.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_velocity
from ..errors import UsageError
from ..options import choice, group, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .arguments import check_mix, check_time_sampler
from .controls import Control, Controlled
from .objective import Networks, Terms, interval_names
from .rows import Rows
from .time_samplers import LogitNormal, TimeSampler
from .velocities import TargetVelocity, guided_velocity, mixed, velocity_option, with_own
from .weights import adaptive_error


@register("objectives", "meanflow")
@dataclass(frozen=True)
class MeanFlow(Controlled):
    """The MeanFlow objective (arXiv 2505.13447, Algorithm 1, with guidance in the target, eqs. 19-21).

    The guided target is v_g = omega·v + kappa·u(z,t,t|y) + (1 − omega − kappa)·u(z,t,t|∅); its effective scale is
    omega/(1 − kappa). The adaptive weight is 1/(‖Δ‖² + norm_eps)^norm_p (eq. 22).

    Args:
        ratio: share of samples with r != t, in [0, 1]; their number is round(B·ratio), the same for every batch
        omega: weight of the data's velocity in the guided target; the guidance scale is omega / (1 - kappa)
        kappa: weight of the network's own class-conditional velocity in the guided target
        guidance_interval: closed interval of times at which the target is guided
        label_dropout: share of samples trained without their label, in [0, 1]; their target is not guided
        norm_p: power of the adaptive loss weight; 0 is plain squared error
        norm_eps: epsilon of the adaptive loss weight
        time_sampler: how the two times are drawn; the larger is t
        velocity: what the target starts from: that of data and noise, a teacher's, or an average
        intervals: times r < t of each sample with r != t, all with one z; the loss is their mean. Each costs as much as
            one more such sample
        sampling: how images are drawn
        bridge: sigma of a Brownian bridge's noise added to the path; 0 is the linear path
        bridge_end: length of the times at both ends in which that noise falls linearly, so that velocities are finite
        control: penalties on the network's Jacobian: flags --control-lipschitz, --control-monotone, …

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    paper: ClassVar[tuple[str, ...]] = ("2505.13447",)
    formula = "u → v_g − (t − r)·du/dt"

    ratio: float = option(0.25, low=0.0, high=1.0)
    omega: float = 1.0
    kappa: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    norm_p: float = option(1.0, low=0.0)
    norm_eps: float = option(0.01, low=0.0, above=True)
    time_sampler: TimeSampler = choice("time_samplers", LogitNormal, prefix="time_")
    velocity: TargetVelocity = velocity_option()
    intervals: int = option(1, low=1, high=64)
    sampling: Sampling = sampler_option(FewSteps)
    bridge: float = option(0.0, low=0.0)
    bridge_end: float = option(0.01, low=0.0, high=0.5, above=True)
    control: Control = group(Control, prefix="control_")

    def __post_init__(self) -> None:
        if not isinstance(self.guidance_interval, Iterable):
            raise TypeError(f"guidance_interval: expected a pair (low, high), got {self.guidance_interval!r}")
        super().__post_init__()
        check_time_sampler(self.time_sampler)
        if self.intervals > 1:
            if not hasattr(self.time_sampler, "below"):
                expected = "expected 1, or a time sampler with below(t), such as logit_normal or uniform"
                raise UsageError(f"{expected}; got {self.intervals}", field="intervals")
            object.__setattr__(self, "conditions", (*interval_names(self.intervals), *self.conditions))
        check_mix(self)

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The r of each interval beyond the first, as the first is drawn where t is known."""
        below: Any = self.time_sampler
        return {name: below.below(t, generator=generator) for name in interval_names(self.intervals)}

    @property
    def guided(self) -> bool:
        """Whether the target differs from the plain velocity anywhere."""
        return self.omega != 1.0 or self.kappa != 0.0

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """‖u − u_tgt‖² with u_tgt = v_g − (t − r)·du/dt, du/dt along (v_g, 0, 1)."""
        v_g, w_cond = self._guided_velocity(b)
        u, du_dt = b.with_derivative(v_g)  # [B, …], [moved, …]
        u = check_velocity("u", u, b.z)
        if self.kappa != 0:
            # where r = t and the label is kept, the prediction itself is the u(z,t,t|y) of the guided target
            v_g = with_own(b, v_g, w_cond, u)
        v_g = v_g.to(b.v.dtype)
        error = adaptive_error(u, v_g, b, du_dt, norm_p=self.norm_p, norm_eps=self.norm_eps)
        return Terms(error.per_sample, {"squared_error": error.squared_error}, u, du_dt, v_g)

    def _guided_velocity(self, b: Rows) -> tuple[Tensor, Tensor]:
        """As `guided_velocity`: v_g, and the weight of u(z,t,t|y) that rows with r = t lack."""
        if not self.guided:
            return b.v, b.v.new_zeros(())
        low, high = self.guidance_interval
        inside = (b.t >= low) & (b.t <= high)  # [B]
        active = inside if b.drop is None else inside & ~b.drop  # [B]
        return guided_velocity(b, active, **mixed(self.omega, self.kappa))
