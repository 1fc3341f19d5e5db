"""Align Your Flow (AYF, arXiv 2506.14603): MeanFlow's rule along a teacher's velocity, with a normalised tangent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_velocity
from ..options import choice, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .objective import Networks, Objective, Terms
from .rows import Rows
from .time_samplers import LogitNormal, TimeSampler
from .velocities import guided
from .weights import normalised, squared_norm


@register("objectives", "ayf")
@dataclass(frozen=True)
class AlignYourFlow(Objective):
    """‖u − sg(u − g/(‖g‖ + c))‖², g = (u − v_φ) + ρ(t − r)·du/dt along the teacher's velocity v_φ (AYF-EMD, eq. 9).

    v_φ is autoguided: autoguidance·v_frozen + (1 − autoguidance)·v_weak. The authors draw the scale for each sample and
    tell the network; here it is one. Their adversarial fine-tuning stays out.

    Args:
        autoguidance: scale of autoguidance in the teacher; 1 is none, and needs no weak teacher
        warm_up_steps: steps in which the derivative's share ρ of the tangent grows to `warm_up_end`
        warm_up_end: ρ from there on
        normalisation: c of the normalised tangent
        norm: of the tangent: over the numbers of a sample, or the root of their mean square
        label_dropout: share of samples trained without their label, in [0, 1]
        time_sampler: how the two times are drawn; the larger is t
        sampling: how images are drawn
    """

    paper = ("2506.14603",)
    formula = "u → u⁻ − g/(‖g‖ + c), g = u − a + ρ(t − r)·du/dt, a a teacher's velocity"
    curriculum = ("warm_up_steps",)
    ratio = 1.0
    conditions = ("warm_up",)
    instantaneous = False

    autoguidance: float = 1.0
    warm_up_steps: int = option(10_000, low=0)
    warm_up_end: float = option(0.99, low=0.0, high=1.0)
    normalisation: float = option(0.1, low=0.0)
    norm: Literal["sum", "mean"] = "sum"
    label_dropout: float = option(0.0, low=0.0, high=1.0)
    time_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(-0.8, 1.0), prefix="time_")
    sampling: Sampling = sampler_option(FewSteps)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Which pretrained networks it needs."""
        return ("frozen",) if self.autoguidance == 1.0 else ("frozen", "weak")

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The warm-up of the step."""
        share = 1.0 if self.warm_up_steps == 0 else step / self.warm_up_steps
        return {"warm_up": torch.full_like(t, min(self.warm_up_end, share))}

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """‖u − sg(u − ĝ)‖²."""
        assert nets.frozen is not None
        a = guided(nets.frozen, b.z, b.t, b.t, b.y, scale=1.0)  # [B, …]
        if self.autoguidance != 1.0:
            assert nets.weak is not None
            weak = guided(nets.weak, b.z, b.t, b.t, b.y, scale=1.0)  # [B, …]
            a = self.autoguidance * a + (1 - self.autoguidance) * weak
        a = a.to(b.v.dtype)
        u, du_dt = b.with_derivative(a)  # [B, …], [moved, …]
        u = check_velocity("u", u, b.z)
        with torch.no_grad():
            g = u - a + b.column(b.conditions["warm_up"]) * b.gap * b.padded(du_dt)  # [B, …]
            u_tgt = u - normalised(g, self.normalisation, self.norm)  # [B, …]
        error = squared_norm(u - u_tgt)  # [B]
        return Terms(error, {"squared_error": squared_norm(g)}, u, du_dt, a, {"u_tgt": u_tgt})
