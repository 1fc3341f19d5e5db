"""Continuous-time consistency models: sCM (arXiv 2410.11081) and the consistency step of rCM (arXiv 2510.08431).

In TrigFlow's terms, with x = σ_d·z/Q at the angle θ = arctan(t/((1 − t)·σ_d)), Q² = σ_d²(1 − t)² + t², and the
network's F there, σ_d·F − dx/dθ is Q·(u − a) for the velocity a that dx/dθ is on our path, and

    cos θ sin θ·x + σ_d·(cos θ sin θ·dF/dθ) = Q·[((1 − t) − cos²θ)·(u − a) + (1 − t)·t·du/dt],

so that the tangent g needs no more than u and its total derivative. F − F⁻ is Q/σ_d·(u − u⁻).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_velocity
from ..errors import UsageError
from ..options import choice, option
from ..registry import register
from ..sampling import ConsistencySteps, Sampling, sampler_option
from .forms import EDM, AverageVelocity, Form, TrigFlow
from .objective import JumpsToData, Networks, Terms
from .pairs import SIGMA_MAX
from .path import Angle
from .rows import Rows
from .time_samplers import LogitNormal, TimeSampler
from .velocities import guided
from .weights import LogVariance, mean_square, normalised, squared_norm


@dataclass(frozen=True)
class ContinuousConsistency(JumpsToData):
    """‖F − F⁻ − g/(‖g‖ + c)‖², g the tangent of the consistency function.

    Args:
        sigma_data: σ_d, standard deviation of the data
        warm_up_steps: steps in which the derivative's share of the tangent grows to 1; 0: it is 1
        normalisation: c of the normalised tangent
        norm: of the tangent: over the numbers of a sample, or the root of their mean square
        guidance: scale of classifier-free guidance in the teacher; 1 is none
        label_dropout: share of samples trained without their label, in [0, 1]
        time_sampler: how t is drawn: a log-normal tan θ·σ_d is a logit-normal t
        form: what the network returns
        sampling: how images are drawn
    """

    conditions = ("warm_up",)
    curriculum = ("warm_up_steps",)

    sigma_data: float = option(0.5, low=0.0, above=True)
    warm_up_steps: int = option(10_000, low=0)
    normalisation: float = option(0.1, low=0.0)
    norm: Literal["sum", "mean"] = "sum"
    guidance: float = 1.0
    label_dropout: float = option(0.0, low=0.0, high=1.0)
    time_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(-1.0, 1.4), prefix="time_")
    form: Form = choice("forms", TrigFlow, prefix="form_")
    sampling: Sampling = sampler_option(partial(ConsistencySteps, steps=1, t_start=SIGMA_MAX, start="sphere"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.form, EDM | TrigFlow) and self.form.sigma_data != self.sigma_data:
            raise UsageError(
                f"expected sigma_data = {self.sigma_data}, got {self.form.sigma_data}", field="form_sigma_data"
            )

    @property
    def clock(self) -> Angle:
        """The angles of the paper."""
        return Angle(self.sigma_data)

    def warm_up(self, step: int) -> float:
        """The derivative's share of the tangent at a step."""
        return 1.0 if self.warm_up_steps == 0 else min(1.0, step / self.warm_up_steps)

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The warm-up of the step."""
        return {"warm_up": torch.full_like(t, self.warm_up(step))}

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """The loss of the tangent along the data's velocity, or that of a teacher."""
        a = b.v
        if self.teachers:
            assert nets.frozen is not None
            label = b.no_label if self.guidance != 1 else -1
            a = guided(nets.frozen, b.z, b.t, b.t, b.y, scale=self.guidance, no_label=label).to(b.v.dtype)
        u, du_dt = b.with_derivative(a)  # [B, …], [moved, …]
        u = check_velocity("u", u, b.z)
        with torch.no_grad():
            t, data = b.column(b.t), self.sigma_data * b.column(1 - b.t)  # [B, 1, …]
            Q = (data.square() + t.square()).sqrt()  # [B, 1, …]
            g = self.tangent(b, u - a, t * b.padded(du_dt), Q, b.column(b.conditions["warm_up"]))  # [B, …]
            u_tgt = u + self.sigma_data / Q * normalised(g, self.normalisation, self.norm)  # [B, …]
        error = mean_square(Q / self.sigma_data * (u - u_tgt))  # [B], of F
        per_sample = self.weighted(error, u[0].numel(), b, nets)  # [B]
        metrics = {"squared_error": squared_norm(u.detach() - u_tgt)}
        others = {"u_tgt": u_tgt, "a": a, "g": g, "mean_square": error}
        return Terms(per_sample, metrics, u, du_dt, b.v, others)

    @abstractmethod
    def tangent(self, b: Rows, away: Tensor, turn: Tensor, Q: Tensor, warm_up: Tensor) -> Tensor:
        """g, (B, …), of u − a and t·du/dt (B, …), and of Q and the warm-up (B, 1, …)."""

    @abstractmethod
    def weighted(self, error: Tensor, D: int, b: Rows, nets: Networks) -> Tensor:
        """The loss of each sample, (B,), of its mean square over D numbers."""


@register("objectives", "sct")
@dataclass(frozen=True)
class ContinuousConsistencyTraining(ContinuousConsistency):
    """sCM's consistency training (arXiv 2410.11081, algorithm 1): e^(−λ)·‖F − F⁻ − ĝ‖²/D + λ, λ(t) learned.

    Args:
        prior_weight: divide the error by t as well, as NVIDIA's FastGen does
        divide_by_size: divide it by D once more, as there
    """

    paper = ("2410.11081",)
    formula = "F → F⁻ + ĝ, g the tangent df/dt along v, normalised"

    prior_weight: bool = False
    divide_by_size: bool = False

    def learned_module(self) -> nn.Module:
        """λ(t)."""
        return LogVariance(times=1)

    def tangent(self, b: Rows, away: Tensor, turn: Tensor, Q: Tensor, warm_up: Tensor) -> Tensor:
        """−cos²θ·(σ_d·F − dx/dθ) − ρ·cos θ sin θ·(x + σ_d·dF/dθ) (eq. 8 with the warm-up ρ)."""
        data = b.column(1 - b.t)  # [B, 1, …]
        cos2 = (self.sigma_data * data / Q).square()  # [B, 1, …]
        return -Q * ((warm_up * data + (1 - warm_up) * cos2) * away + warm_up * data * turn)

    def weighted(self, error: Tensor, D: int, b: Rows, nets: Networks) -> Tensor:
        """e^(−λ)·error + λ."""
        assert nets.learned is not None
        log_variance = nets.learned(b.t, b.t)  # [B]
        error = error / b.t.to(error.dtype) if self.prior_weight else error
        return error / (log_variance.exp() * (D if self.divide_by_size else 1)) + log_variance


@register("objectives", "scd")
@dataclass(frozen=True)
class ContinuousConsistencyDistillation(ContinuousConsistencyTraining):
    """sCM's consistency distillation (arXiv 2410.11081, §5): along the velocity of a frozen flow, guided or not.

    The authors draw the guidance scale from [1, 2] for each sample and tell the network; here it is one.
    """

    paper = ("2410.11081",)
    formula = "F → F⁻ + ĝ, g the tangent df/dt along a teacher's velocity, normalised"
    teachers = ("frozen",)


@register("objectives", "rcm")
@dataclass(frozen=True)
class RegularizedConsistency(ContinuousConsistency):
    """The consistency step of rCM (arXiv 2510.08431): loss_scale·‖F − F⁻ − ĝ‖², σ_d = 1, distilled from a frozen flow.

    rCM's other half, distribution matching with a network of its own for the fake score, stays out. The authors sum
    the loss over the batch; here as everywhere it is the mean.

    Args:
        distil: along the velocity of a frozen flow; otherwise along that of data and noise
        loss_scale: factor of the loss
    """

    paper = ("2510.08431",)
    formula = "F → F⁻ + ĝ as in `scd`, with σ_d = 1 and a weight that is fixed"

    sigma_data: float = option(1.0, low=0.0, above=True)
    warm_up_steps: int = option(1000, low=0)
    guidance: float = 5.0
    time_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(0.7, 1.6), prefix="time_")
    form: Form = choice("forms", lambda: AverageVelocity(time_scale=1000.0, one_time=True), prefix="form_")
    distil: bool = True
    loss_scale: float = option(100.0, low=0.0, above=True)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Which pretrained networks it needs."""
        return ("frozen",) if self.distil else ()

    @property
    def taught(self) -> Mapping[str, Any]:
        """With `distil`."""
        return {"distil": True}

    def tangent(self, b: Rows, away: Tensor, turn: Tensor, Q: Tensor, warm_up: Tensor) -> Tensor:
        """−cos θ·√(1 − ρ²·sin²θ)·(F − dx/dθ) − (ρ·cos θ sin θ·x + cos θ sin θ·dF/dθ)."""
        t, data = b.column(b.t), b.column(1 - b.t)  # [B, 1, …] each
        cos, sin = self.sigma_data * data / Q, t / Q  # [B, 1, …] each
        whole = Q * ((data - cos.square()) * away + data * turn)  # [B, …], with ρ = 1
        x = self.sigma_data * b.z / Q  # [B, …]
        root = (1 - (warm_up * sin).square()).sqrt()  # [B, 1, …]
        return -cos * root * Q * away - whole + (1 - warm_up) * cos * sin * x

    def weighted(self, error: Tensor, D: int, b: Rows, nets: Networks) -> Tensor:
        """loss_scale·‖F − F⁻ − ĝ‖²."""
        return self.loss_scale * D * error
