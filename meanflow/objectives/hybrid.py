"""Flow matching and MeanFlow of every sample, at one point of the path, mixed with a weight of its own.

L = w·‖u(z, t, t) − v_g‖² + (1 − w)·‖u(z, r, t) − v_g + (t − r)·du/dt‖²,  both with MeanFlow's weight and guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_velocity
from ..options import option
from ..registry import register
from .meanflow import MeanFlow
from .objective import Networks, Terms
from .rows import Rows
from .velocities import with_own
from .weights import adaptive_error


@register("objectives", "hybrid")
@dataclass(frozen=True)
class Hybrid(MeanFlow):
    """MeanFlow (arXiv 2505.13447) and flow matching (arXiv 2210.02747) of each sample with r != t, in one batch.

    MeanFlow alone has either of both in a row. Here the network also sees the velocity of the point whose average
    velocity it learns; one evaluation more, with its backward, of each of these rows. Rows with r = t have the loss of
    flow matching alone.

    Args:
        ratio: share of samples with r != t, in [0, 1], which have both losses
        mix: weight w of flow matching; MeanFlow has 1 - w
        mix_schedule: constant, or gap: w = 1 - (1 - mix)(t - r), from 1 at r = t to `mix` over the whole path

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    metrics = ("squared_error", "squared_error_fm")
    paper = ("2505.13447", "2210.02747")
    formula = "u(z, t, t) → v_g and u → v_g − (t − r)·du/dt, of each sample at one point, with weights w and 1 − w"

    ratio: float = option(1.0, low=0.0, high=1.0)
    mix: float = option(0.5, low=0.0, high=1.0)
    mix_schedule: Literal["constant", "gap"] = "constant"

    def share(self, t: Tensor, r: Tensor) -> Tensor:
        """w, (B,), of rows with times t and r (B,)."""
        if self.mix_schedule == "constant":
            return torch.full_like(t, self.mix)
        return 1 - (1 - self.mix) * (t - r)

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """Both losses, the second part of the batch with r = t."""
        v_g, w_label = self._guided_velocity(b)
        B, n = len(b.z), b.moved
        points = n // self.intervals  # which the intervals share
        both = b.joined(b.still(points))  # B + points rows
        u, du_dt = both.with_derivative(v_g)  # [B + n, …], [n, …]
        u = check_velocity("u", u, both.z)
        if self.kappa != 0:
            v_g = with_own(b, v_g, w_label, u[:B])
        v_g = v_g.to(b.v.dtype)
        mf = adaptive_error(u[:B], v_g, b, du_dt, norm_p=self.norm_p, norm_eps=self.norm_eps)
        if n == 0:
            metrics = {"squared_error": mf.squared_error, "squared_error_fm": mf.squared_error}
            return Terms(mf.per_sample, metrics, u, du_dt, v_g)
        fm = adaptive_error(u[B:], v_g[:points], b, norm_p=self.norm_p, norm_eps=self.norm_eps)
        w = self.share(b.t[:n], b.r[:n]).to(mf.per_sample.dtype)  # [n]
        mixed = w * fm.per_sample.repeat(self.intervals) + (1 - w) * mf.per_sample[:n]  # [n]
        squared_fm = torch.cat([fm.squared_error.repeat(self.intervals), mf.squared_error[n:]])  # [B]
        metrics = {"squared_error": mf.squared_error, "squared_error_fm": squared_fm}
        return Terms(torch.cat([mixed, mf.per_sample[n:]]), metrics, u[:B], du_dt, v_g)
