"""Flow map matching (arXiv 2406.07507) and flow maps by self-distillation (arXiv 2505.18825).

Instantaneous velocity on the diagonal r = t, and beside it one of three rules: Lagrangian (∂X/∂r is the velocity at its
end), Eulerian (the total derivative along the velocity) or progressive (two steps). The velocity is the network's own,
or a teacher's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_velocity
from ..options import choice, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .objective import Networks, Objective, Terms
from .rows import Net, Rows
from .rules import Pair, composition, terminal_velocity, total_derivative
from .time_samplers import TimeSampler, Uniform
from .velocities import guided
from .weights import LogVariance, mean_square, squared_norm


@dataclass(frozen=True)
class FlowMapMatching(Objective, ABC):
    """e^(−λ)·‖u − u_tgt‖²/D + λ with a learned λ(t, r), D numbers a sample.

    The authors write the sum over the numbers, which differs by the constant ln D in λ.

    Args:
        ratio: share of samples with r != t, in [0, 1]; the others have r = t and the velocity as their target
        label_dropout: share of samples trained without their label, in [0, 1]
        time_sampler: how the two times are drawn; the larger is t
        sampling: how images are drawn
    """

    everywhere: ClassVar[bool] = False  # whether the rule needs a teacher's velocity, as the diagonal does

    ratio: float = option(0.25, low=0.0, high=1.0)
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    time_sampler: TimeSampler = choice("time_samplers", Uniform, prefix="time_")
    sampling: Sampling = sampler_option(FewSteps)

    def learned_module(self) -> nn.Module:
        """λ(t, r)."""
        return LogVariance(times=2)

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """e^(−λ)·‖u − u_tgt‖²/D + λ."""
        assert nets.learned is not None
        teacher = nets.frozen if self.teachers else None
        a, first = b.v, 0 if self.everywhere else b.moved  # of the rows that need it
        if teacher is not None:
            v = guided(teacher, b.z[first:], b.t[first:], b.t[first:], b.y[first:], scale=1.0)  # [B − first, …]
            a = torch.cat([a[:first], v.to(a.dtype)])  # [B, …]
        pair = self.pair(b, a, teacher)
        λ = nets.learned(b.t, b.r)  # [B]
        away = pair.u - pair.u_tgt  # [B, …]
        metrics = {"squared_error": squared_norm(away.detach())}
        per_sample = (-λ).exp() * mean_square(away) + λ  # [B]
        return Terms(per_sample, metrics, pair.u, pair.du_dt, a, {"u_tgt": pair.u_tgt})

    @abstractmethod
    def pair(self, b: Rows, a: Tensor, teacher: Net | None) -> Pair:
        """What is trained towards what: a (B, …) is the velocity of the diagonal, the teacher's if there is one."""


@register("objectives", "lsd")
@dataclass(frozen=True)
class LagrangianSelfDistillation(FlowMapMatching):
    """LSD (arXiv 2505.18825, eq. 15): u − (t − r)·∂u/∂r towards the velocity u⁻(X, r, r) at the end.

    Args:
        detach_tangent: train u alone, with ∂u/∂r off the tape. The authors train through it, which here needs a network
            of plain PyTorch
    """

    paper = ("2505.18825",)
    formula = "u − (t − r)·∂u/∂r → u⁻(X_{t→r}, r, r); on the diagonal v"

    detach_tangent: bool = True

    def pair(self, b: Rows, a: Tensor, teacher: Net | None) -> Pair:
        """The terminal velocity."""
        u, du_dr = b.with_derivative(None, dr=1.0, dt=0.0, differentiable=not self.detach_tangent)
        pair = terminal_velocity(b, teacher or b.net, u=check_velocity("u", u, b.z), du_dr=du_dr)
        return pair._replace(u_tgt=torch.cat([pair.u_tgt[: b.moved], a[b.moved :]]))


@register("objectives", "lmd")
@dataclass(frozen=True)
class LagrangianDistillation(LagrangianSelfDistillation):
    """LMD (arXiv 2406.07507, §3.2): LSD with the velocity of a frozen flow."""

    paper = ("2406.07507",)
    formula = "u − (t − r)·∂u/∂r → a teacher's velocity at X_{t→r}; on the diagonal its velocity"
    teachers = ("frozen",)


@register("objectives", "esd")
@dataclass(frozen=True)
class EulerianSelfDistillation(FlowMapMatching):
    """ESD (arXiv 2505.18825, eq. 16): u towards v⁻ − (t − r)·du/dt along the network's own velocity v⁻ = u⁻(z, t, t).

    The authors train through ∂u/∂t; here the whole derivative is off the tape. Unstable on images, they say.
    """

    paper = ("2505.18825",)
    formula = "u → a − (t − r)·du/dt along its own velocity a = u⁻(z, t, t)"
    everywhere = True

    def pair(self, b: Rows, a: Tensor, teacher: Net | None) -> Pair:
        """The total derivative."""
        n = b.moved
        if teacher is None and n > 0:
            own = guided(b.net, b.z[:n], b.t[:n], b.t[:n], b.y[:n], scale=1.0).to(a.dtype)  # [moved, …]
            a = torch.cat([own, a[n:]])
        pair = total_derivative(b, a)
        return pair._replace(u=check_velocity("u", pair.u, b.z))


@register("objectives", "emd")
@dataclass(frozen=True)
class EulerianDistillation(EulerianSelfDistillation):
    """EMD (arXiv 2406.07507, §3.2): ESD along the velocity of a frozen flow."""

    paper = ("2406.07507",)
    formula = "u → a − (t − r)·du/dt along a teacher's velocity a"
    teachers = ("frozen",)


@register("objectives", "psd")
@dataclass(frozen=True)
class ProgressiveSelfDistillation(FlowMapMatching):
    """PSD (arXiv 2505.18825, eq. 17): u towards the average velocity of two steps of its own.

    Args:
        midpoint: the first step ends half-way (PSD-M); otherwise anywhere, uniformly (PSD-U)
    """

    paper = ("2505.18825",)
    formula = "u → average velocity of two steps of its own, half-way"
    conditions = ("s",)

    midpoint: bool = True

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """s between r and t."""
        if self.midpoint:
            return {"s": (t + r) / 2}
        return {"s": t + torch.rand(t.shape, generator=generator, device=t.device) * (r - t)}

    def pair(self, b: Rows, a: Tensor, teacher: Net | None) -> Pair:
        """The composition."""
        net = teacher or b.net
        return composition(b, a, b.conditions["s"], first=net, second=net)


@register("objectives", "pfmm")
@dataclass(frozen=True)
class ProgressiveFlowMapMatching(ProgressiveSelfDistillation):
    """PFMM (arXiv 2406.07507, §3.3): u towards two steps of a frozen flow map."""

    paper = ("2406.07507",)
    formula = "u → average velocity of two steps of a flow map"
    teacher_jumps = True
    teachers = ("frozen",)
