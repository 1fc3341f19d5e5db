"""SplitMeanFlow (arXiv 2507.16884): the average velocity of an interval is that of its two parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..options import choice, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .objective import Networks, Objective, Terms
from .rows import Rows
from .rules import composition
from .time_samplers import LogitNormal, TimeSampler
from .velocities import guided
from .weights import squared_norm


@register("objectives", "split_meanflow")
@dataclass(frozen=True)
class SplitMeanFlow(Objective):
    """‖u(z, r, t) − sg[(1 − λ)·u(z_s, r, s) + λ·u(z, s, t)]‖² with s = (1 − λ)t + λr, λ uniform; no derivative.

    Args:
        ratio: share of samples with r != t, in [0, 1]; the others are trained towards a velocity
        distil: take that velocity from a frozen flow, as the authors do in their second stage
        guidance: scale of classifier-free guidance in the teacher; 1 is none
        label_dropout: share of samples trained without their label, in [0, 1]
        time_sampler: how the two times are drawn; the larger is t
        sampling: how images are drawn
    """

    paper = ("2507.16884",)
    formula = "u → (1 − λ)·u⁻(z_s, r, s) + λ·u⁻(z, s, t), s = (1 − λ)t + λr"
    conditions = ("s",)

    ratio: float = option(0.5, low=0.0, high=1.0)
    distil: bool = False
    guidance: float = 1.0
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    time_sampler: TimeSampler = choice("time_samplers", LogitNormal, prefix="time_")
    sampling: Sampling = sampler_option(FewSteps)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Which pretrained networks it needs."""
        return ("frozen",) if self.distil else ()

    @property
    def taught(self) -> Mapping[str, Any]:
        """With `distil`."""
        return {"distil": True}

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """s between r and t."""
        share = torch.rand(t.shape, generator=generator, device=t.device)  # [B], λ
        return {"s": t + share * (r - t)}

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """‖u − u_tgt‖²."""
        a, n = b.v, b.moved
        if self.distil and n < len(b.z):
            assert nets.frozen is not None
            label = b.no_label if self.guidance != 1 else -1
            z, t, y = b.z[n:], b.t[n:], b.y[n:]
            a = torch.cat([a[:n], guided(nets.frozen, z, t, t, y, scale=self.guidance, no_label=label).to(a.dtype)])
        pair = composition(b, a, b.conditions["s"], first=b.net, second=b.net)
        error = squared_norm(pair.u - pair.u_tgt)  # [B]
        return Terms(error, {"squared_error": error.detach()}, pair.u, None, a, {"u_tgt": pair.u_tgt})
