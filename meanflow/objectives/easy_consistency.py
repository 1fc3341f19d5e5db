"""Easy consistency tuning (ECT, arXiv 2406.14548): consistency training whose gap closes in stages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..options import choice, option
from ..registry import register
from ..sampling import ConsistencySteps, Sampling, sampler_option
from .consistency_training import LEAST_GAP, consistency_terms
from .forms import EDM, Form
from .objective import JumpsToData, Networks, Terms
from .pairs import SIGMA_MAX
from .path import LEVELS
from .rows import Net, Rows
from .rules import composition
from .time_samplers import LogitNormal, TimeSampler
from .velocities import TargetVelocity, velocity_option
from .weights import pseudo_huber


@register("objectives", "ect")
@dataclass(frozen=True)
class EasyConsistency(JumpsToData):
    """Easy consistency tuning: (√(‖f(z_t, t) − f⁻(z_s, s)‖² + c²) − c)/(σ_t − σ_s), f the denoised image.

    σ_s = σ_t·max(0, 1 − (1 + k·sigmoid(−b·σ_t))/q^(stage + 1)): at first mostly 0, where the target is the image
    itself, and nearer to σ_t by a factor of q in each stage.

    Args:
        stage_factor: q, factor between the gaps of two stages
        gap_scale: k, of the gap
        gap_slope: b, of the gap
        stage_steps: steps of a stage
        huber: c of the pseudo-Huber distance; 0 is the norm
        eval_sigma_min: noise level at which images are drawn as they are, while training has 0; in the form "edm"
        label_dropout: share of samples trained without their label, in [0, 1]
        time_sampler: how t is drawn; a log-normal σ is a logit-normal t
        velocity: what the target starts from: that of data and noise, a teacher's, or an average
        form: what the network returns
        sampling: how images are drawn
    """

    paper = ("2406.14548",)
    formula = "f(z_t, t) → f⁻(z_s, s), the gap σ_t − σ_s shrinks in stages"
    curriculum = ("stage_steps",)
    conditions = ("s", "gap")

    stage_factor: float = option(2.0, low=1.0, above=True)
    gap_scale: float = option(8.0, low=0.0)
    gap_slope: float = option(1.0, low=0.0)
    stage_steps: int = option(25_000, low=1)
    huber: float = option(0.0, low=0.0)
    eval_sigma_min: float = option(0.003, low=0.0)
    label_dropout: float = option(0.0, low=0.0, high=1.0)
    time_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(-1.1, 2.0), prefix="time_")
    velocity: TargetVelocity = velocity_option()
    form: Form = choice("forms", EDM, prefix="form_")
    sampling: Sampling = sampler_option(partial(ConsistencySteps, steps=1, t_start=SIGMA_MAX, start="scaled"))

    def sampled(self, net: Net) -> Net:
        """In a form that is the identity at `eval_sigma_min`."""
        if not isinstance(self.form, EDM):
            return super().sampled(net)
        return dataclasses.replace(self.form, sigma_min=self.eval_sigma_min).wrap(net)

    def partner(self, t: Tensor, stage: int) -> dict[str, Tensor]:
        """s of times t in a stage (counted from 0), and σ_t − σ_s, (B,) each: late in the training, times of single
        precision are too coarse for the difference."""
        sigma = LEVELS.of_linear(t)  # [B]
        # a negative power: of large stages 0 instead of an overflow
        share = (1 + self.gap_scale * torch.sigmoid(-self.gap_slope * sigma)) * self.stage_factor ** -(stage + 1)  # [B]
        share = share.clamp_max(1.0)
        s = torch.minimum(LEVELS.to_linear(sigma * (1 - share)), t)  # [B]
        return {"s": s, "gap": (sigma * share).clamp_min(LEAST_GAP)}

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """s and the gap of the stage that the step is in."""
        return self.partner(t, step // self.stage_steps)

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """(√(‖f − f⁻‖² + c²) − c)/(σ_t − σ_s)."""
        s = b.conditions["s"]  # [B]
        pair = composition(b, b.v, s, second=b.net)
        jump = b.column(b.t) * (pair.u - pair.u_tgt)  # [B, …]
        return consistency_terms(b, pair, pseudo_huber(jump, self.huber) / b.conditions["gap"].to(jump.dtype))
