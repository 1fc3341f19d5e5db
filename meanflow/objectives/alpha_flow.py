"""α-Flow (arXiv 2510.20771): from flow matching to MeanFlow by a composition whose first step shrinks with α."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..options import choice, group, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .arguments import check_mix
from .controls import Control, Controlled
from .objective import Networks, Terms
from .rows import Rows
from .rules import Pair, composition, total_derivative
from .time_samplers import LogitNormal, TimeSampler
from .velocities import TargetVelocity, guided_velocity, mixed, velocity_option, with_own
from .weights import mean_square, power, squared_norm


@register("objectives", "alpha_flow")
@dataclass(frozen=True)
class AlphaFlow(Controlled):
    """u(z, r, t) towards a composition at s = t − α(t − r), α falling from 1 to 0; with α = 0 MeanFlow's target.

    The loss is α·q/(q + norm_eps) with q the mean square of the error and the divisor detached, without the factor α
    where r = t or α = 0. A dropped label stays dropped in the guided velocity.

    Args:
        ratio: share of samples with r != t, in [0, 1]
        omega, kappa: weights of the data's and of the network's own velocity in the guided one, as in MeanFlow
        guidance_interval: open interval of times at which the velocity is guided, and labels are dropped
        label_dropout: share of samples trained without their label, in [0, 1]
        clip: largest absolute value of a composed target
        norm_eps: epsilon of the weight
        alpha_start, alpha_end: steps between which α falls
        alpha_gamma: steepness of its fall
        alpha_clamp: below it α is 0, and above 1 minus it 1
        time_sampler: how the two times are drawn; the larger is t
        velocity: what the target starts from: that of data and noise, a teacher's, or an average
        sampling: how images are drawn
        control: penalties on the network's Jacobian: flags --control-lipschitz, --control-monotone, …
    """

    paper = ("2510.20771",)
    formula = "u → α·v_g + (1 − α)·u⁻(z_s, r, s), s = t − α(t − r), α from 1 to 0; then MeanFlow's"
    curriculum = ("alpha_start", "alpha_end")
    conditions = ("s",)

    ratio: float = option(0.5, low=0.0, high=1.0)
    omega: float = 1.0
    kappa: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    clip: float = option(4.0, low=0.0, above=True)
    norm_eps: float = option(1e-3, low=0.0, above=True)
    alpha_start: int = option(0, low=0)
    alpha_end: int = option(400_000, low=1)
    alpha_gamma: float = option(25.0, low=0.0, above=True)
    alpha_clamp: float = option(0.005, low=0.0, high=0.5)
    time_sampler: TimeSampler = choice("time_samplers", LogitNormal, prefix="time_")
    velocity: TargetVelocity = velocity_option()
    sampling: Sampling = sampler_option(FewSteps)
    control: Control = group(Control, prefix="control_")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mix(self)
        if self.alpha_end <= self.alpha_start:
            expected = f"expected more than alpha_start = {self.alpha_start}"
            raise UsageError(f"{expected}, got {self.alpha_end}", field="alpha_end")

    def alpha(self, step: int) -> float:
        """α at a step."""
        if not self.alpha_start <= step <= self.alpha_end:
            return 1.0 if step < self.alpha_start else 0.0
        way = (step - self.alpha_start) / (self.alpha_end - self.alpha_start)
        alpha = 0.5 * (1.0 - math.tanh(self.alpha_gamma / 2 * (way - 0.5)))
        return 0.0 if alpha < self.alpha_clamp else 1.0 if alpha > 1.0 - self.alpha_clamp else alpha

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """s = t − α(t − r)."""
        return {"s": t - self.alpha(step) * (t - r)}

    def phase_at(self, t: Tensor, r: Tensor, conditions: Mapping[str, Tensor], step: int | None = None) -> str:
        """Composed, or in the last part of the training, where α is 0, derived."""
        derived = self.alpha(step) == 0.0 if step is not None else bool((conditions["s"] == t).all())
        return "derived" if derived else "composed"

    def dropped(self, drop: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Those at times of the guidance."""
        return drop & self._inside(t)

    def _inside(self, t: Tensor) -> Tensor:
        low, high = self.guidance_interval
        return (t > low) & (t < high)

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """β·q/(q + norm_eps), β = α where the target is composed."""
        v_g, w_label = b.v, b.v.new_zeros(())
        if self.omega != 1.0 or self.kappa != 0.0:
            v_g, w_label = guided_velocity(b, self._inside(b.t), **mixed(self.omega, self.kappa))
        beta = torch.ones_like(b.t)  # [B]
        if b.phase == "derived":
            pair = total_derivative(b, v_g)
        else:
            s, n = b.conditions["s"], b.moved
            pair = composition(b, v_g, s, second=b.net)
            target = torch.cat([pair.u_tgt[:n].clamp(-self.clip, self.clip), pair.u_tgt[n:]])  # [B, …]
            pair = Pair(pair.u, target)
            share = torch.where(b.t > b.r, (b.t - s) / (b.t - b.r), beta)  # [B], α
            beta = torch.cat([share[:n], beta[n:]])  # [B]
        u_tgt = with_own(b, pair.u_tgt, w_label, pair.u) if self.kappa != 0 else pair.u_tgt
        q = mean_square(pair.u - u_tgt)  # [B]
        per_sample = beta.to(q.dtype) * power(q, p=1.0, c=self.norm_eps)  # [B]
        v_g = with_own(b, v_g, w_label, pair.u) if self.kappa != 0 else v_g
        metrics = {"squared_error": squared_norm(pair.u.detach() - u_tgt)}
        return Terms(per_sample, metrics, pair.u, pair.du_dt, v_g, {"u_tgt": u_tgt})
