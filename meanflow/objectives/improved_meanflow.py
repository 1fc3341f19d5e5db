"""Improved MeanFlow (arXiv 2512.02012), in the paper's letters.

z_t = (1 − t) x + t e,  v = e − x,  V = u + (t − r)·stopgrad(du/dt),  du/dt = (∂u/∂z)·v_c + ∂u/∂t, where v_c is the
network's own conditional velocity: the tangent then depends on z alone, as the marginal velocity does. V is trained
towards the guided velocity v_g, and so is the auxiliary head that gives v_c.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_finite, check_velocity
from ..errors import NetworkError
from ..options import choice, option
from ..registry import register
from ..sampling import GuidedSteps, Sampling, sampler_option
from .arguments import check_time_sampler
from .objective import Networks, Objective, ObjectiveOutput, Terms
from .rows import Rows, forget_autocast
from .time_samplers import LogitNormal, TimeSampler
from .velocities import TargetVelocity, velocity_option
from .weights import adaptive_error


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlowOutput(ObjectiveOutput):
    """`ObjectiveOutput` of improved MeanFlow: `u_tgt` there is v_g − (t − r)·du/dt, so ‖u − u_tgt‖² = ‖V − v_g‖².

    v_head: (B, C, H, W) the auxiliary velocity, detached.
    squared_error_v: (B,) ‖v_head − v_g‖² of each sample, detached.
    omega, t_min, t_max: (B,) the guidance that each sample was trained with.
    """

    v_head: Tensor
    squared_error_v: Tensor
    omega: Tensor
    t_min: Tensor
    t_max: Tensor


@register("objectives", "imf")
@dataclass(frozen=True)
class ImprovedMeanFlow(Objective):
    """The improved MeanFlow objective (arXiv 2512.02012, §4), for networks such as `IMFDiT`.

    One network learns every guidance: each sample draws a scale ω and an interval [t_min, t_max], which the network
    sees and in which v_g = v + (1 − 1/ω)(v_c − v_u), with v_c and v_u the auxiliary head's velocities with this ω and
    label, and with neither. Samples with r = t have the whole interval [0, 1].

    The network is (u, v) = net(z, r, t, y, omega=, t_min=, t_max=, heads=) with attribute `num_classes`. It is called
    once under no_grad with heads="v" for the guidance, and once for training.

    Args:
        ratio: share of samples with r != t, in [0, 1]; their number is round(B·ratio), the same for every batch
        cfg_beta: guidance scales are drawn with density omega^-cfg_beta from 1 to omega_max; 1 is uniform in log omega
        omega_max: largest guidance scale in training, at least 1; with 1 nothing is guided
        label_dropout: share of samples trained without their label, in [0, 1]; their target is not guided
        norm_p: power of the adaptive loss weight of both losses; 0 is plain squared error
        norm_eps: epsilon of the adaptive loss weight
        time_sampler: how the two times are drawn; the larger is t
        velocity: what the target starts from: that of data and noise, a teacher's, or an average
        sampling: how images are drawn

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    paper = ("2512.02012",)
    formula = "u + (t − r)·sg(du/dt) → v_g, and v head → v_g"
    outputs = ("u", "v")
    metrics = ("squared_error", "squared_error_v")
    conditions = ("omega", "t_min", "t_max")
    keywords = (*conditions, "heads")
    Output = ImprovedMeanFlowOutput

    ratio: float = option(0.5, low=0.0, high=1.0)
    cfg_beta: float = 1.0
    omega_max: float = option(8.0, low=1.0)
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    norm_p: float = option(1.0, low=0.0)
    norm_eps: float = option(0.01, low=0.0, above=True)
    time_sampler: TimeSampler = choice("time_samplers", LogitNormal, prefix="time_")
    velocity: TargetVelocity = velocity_option()
    sampling: Sampling = sampler_option(GuidedSteps)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time_sampler(self.time_sampler)

    def draw_omega(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """n guidance scales in [1, omega_max] with density proportional to ω^(−cfg_beta), (n,) float32."""
        share = torch.rand(n, generator=generator, device=device)  # [B]
        power, log_max = 1.0 - self.cfg_beta, math.log(self.omega_max)
        if power == 0.0:
            return torch.exp(share * log_max)  # [B]
        # the inverse of the cumulative distribution; log1p and expm1 keep it exact near β = 1
        return torch.exp(torch.log1p(share * math.expm1(power * log_max)) / power)  # [B]

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """ω, t_min uniform on [0, 1/2] and t_max on [1/2, 1], (B,) each."""
        omega = self.draw_omega(len(t), generator=generator, device=t.device)  # [B]
        t_min, t_max = torch.rand(2, len(t), generator=generator, device=t.device) / 2  # [B] each
        return {"omega": omega, "t_min": t_min, "t_max": 1 - t_max}

    def check_conditions(self, conditions: Mapping[str, Tensor]) -> None:
        """Raise unless ω is at least 1 everywhere, and all are finite."""
        if not bool((conditions["omega"] >= 1).all()):  # NaN fails too
            raise ValueError("omega: expected at least 1 in every row")
        for name, a in conditions.items():
            check_finite(name, a)

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """‖V − v_g‖² and ‖v_head − v_g‖², each with its weight."""
        conditions: dict[str, Any] = dict(b.conditions)
        conditions["t_min"] = torch.cat([b.conditions["t_min"][: b.moved], torch.zeros_like(b.t[b.moved :])])  # [B]
        conditions["t_max"] = torch.cat([b.conditions["t_max"][: b.moved], torch.ones_like(b.t[b.moved :])])  # [B]
        omega = conditions["omega"]  # [B]
        inside = (conditions["t_min"] <= b.t) & (b.t <= conditions["t_max"])  # [B]
        omega_eff = torch.where(inside, omega, torch.ones_like(omega))  # [B]
        v_u, v_c = self._own_velocities(b, omega_eff)  # [B, …], [moved, …]

        out, out_dot = b.with_derivative(v_c, **conditions)
        u, v_head = _pair(out)
        du_dt = None if out_dot is None else out_dot[0]  # [moved, …]
        u, v_head = check_velocity("u", u, b.z), check_velocity("v", v_head, b.z)  # [B, …]
        with torch.no_grad():
            # where r = t and the label is kept, the training forward's v head is v_c itself
            v_c = torch.cat([v_c, v_head[b.moved :].to(b.v.dtype)])  # [B, …]
            weight = 1 - 1 / omega_eff  # [B]
            weight = weight if b.drop is None else weight.masked_fill(b.drop, 0.0)  # a row without label is not guided
            v_g = b.v + b.column(weight) * (v_c - v_u)  # [B, …]

        error = adaptive_error(u, v_g, b, du_dt, norm_p=self.norm_p, norm_eps=self.norm_eps)
        error_v = adaptive_error(v_head, v_g, b, norm_p=self.norm_p, norm_eps=self.norm_eps)
        metrics = {"squared_error": error.squared_error, "squared_error_v": error_v.squared_error}
        others = {"v_head": v_head.detach(), **conditions}
        return Terms(error.per_sample + error_v.per_sample, metrics, u, du_dt, v_g, others)

    @torch.no_grad()
    def _own_velocities(self, b: Rows, omega: Tensor) -> tuple[Tensor, Tensor]:
        """v_u (B, …) of every row and v_c (moved, …) where r ≠ t: one forward of the shared blocks and the v head."""
        null = torch.full_like(b.labels, b.no_label)  # [B]
        n = b.moved
        z, t, y = torch.cat([b.z, b.z[:n]]), torch.cat([b.t, b.t[:n]]), torch.cat([null, b.labels[:n]])
        omega = torch.cat([torch.ones_like(omega), omega[:n]])  # [B + moved]
        whole = {"t_min": torch.zeros_like(t), "t_max": torch.ones_like(t)}
        _, velocities = _pair(b.net(z, t, t, y, omega=omega, **whole, heads="v"))
        velocities = check_velocity("v", velocities, z).to(b.v.dtype)  # [B + moved, …]
        forget_autocast(b.z.device)
        v_u, v_c = velocities.split([len(b.z), n])
        return v_u, v_c


def _pair(out: Any) -> tuple[Any, Any]:
    """(u, v) of a network that returns both."""
    if not isinstance(out, tuple) or len(out) != 2:
        what = f"{len(out)} values" if isinstance(out, tuple) else type(out).__name__
        raise NetworkError(f"net: expected it to return (u, v), as IMFDiT does, got {what}")
    return out[0], out[1]
