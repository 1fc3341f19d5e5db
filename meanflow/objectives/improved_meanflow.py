"""Improved MeanFlow (arXiv 2512.02012), in the paper's letters.

z_t = (1 − t) x + t e,  v = e − x,  V = u + (t − r)·stopgrad(du/dt),  du/dt = (∂u/∂z)·v_c + ∂u/∂t, where v_c is the
network's own conditional velocity: the tangent then depends on z alone, as the marginal velocity does. V is trained
towards the guided velocity v_g, and so is the auxiliary head that gives v_c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfkernels import adaptive_squared_error, jvp
from mfkernels.checks import check_number

from ..checks import check_finite, check_takes, check_velocity
from .draws import Draws
from .meanflow import column, forget_autocast, net_num_classes, rows_first
from .objective import Net, Objective, ObjectiveOutput, check_draws, check_shares_and_norm, check_times
from .time_samplers import LogitNormal, TimeSampler


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ImprovedMeanFlow(Objective[ImprovedMeanFlowOutput]):
    """The improved MeanFlow objective (arXiv 2512.02012, §4), for networks such as `IMFDiT`.

    One network learns every guidance: each sample draws a scale ω and an interval [t_min, t_max], which the network
    sees and in which v_g = v + (1 − 1/ω)(v_c − v_u), with v_c and v_u the auxiliary head's velocities with this ω and
    label, and with neither. Samples with r = t have the whole interval [0, 1].

    Args:
        ratio: share of samples with r ≠ t, in [0, 1]; their number is round(B·ratio), the same for every batch.
        cfg_beta: power β of the density ω^(−β) of ω on [1, omega_max]; 1 is uniform in log ω.
        omega_max: largest ω, at least 1; with 1 nothing is guided.
        label_dropout: probability that a sample is trained without its label, in [0, 1]; such a row is not guided.
        norm_p: power p of the adaptive weight 1/(‖Δ‖² + norm_eps)^p of both losses; 0 is plain squared error.
        norm_eps: ε in it.
        time_sampler: how the two times are drawn; the larger is t.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    ratio: float = 0.5
    cfg_beta: float = 1.0
    omega_max: float = 8.0
    label_dropout: float = 0.1
    norm_p: float = 1.0
    norm_eps: float = 0.01
    time_sampler: TimeSampler = field(default_factory=LogitNormal)

    def __post_init__(self) -> None:
        check_shares_and_norm(self)
        check_number("cfg_beta", self.cfg_beta)
        check_number("omega_max", self.omega_max, 1)

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

    def _draw_conditions(
        self, n: int, generator: torch.Generator | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        """ω, t_min uniform on [0, 1/2] and t_max on [1/2, 1]."""
        omega = self.draw_omega(n, generator=generator, device=device)  # [B]
        t_min, t_max = torch.rand(2, n, generator=generator, device=device) / 2  # [B] each
        return {"omega": omega, "t_min": t_min, "t_max": 1 - t_max}

    def loss_of(self, net: Net, x: Tensor, y: Tensor, draws: Draws) -> ImprovedMeanFlowOutput:
        """The loss at what `draw` gave; nothing random, no read on the host: this is what a compiler takes whole."""
        check_draws(net, x, y, draws.noise, t=draws.t, r=draws.r, drop=draws.drop, **draws.conditions)
        return self._loss(
            net, x, draws.noise, draws.t, draws.r, y, draws.drop, **draws.conditions, order=draws.order, rows=draws.rows
        )

    def loss_at(
        self,
        net: Net,
        *,
        x: Tensor,
        noise: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        drop: Tensor | None = None,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
    ) -> ImprovedMeanFlowOutput:
        """The loss at given draws; nothing random inside.

        Args:
            net: (u, v) = net(z, r, t, y, omega=, t_min=, t_max=, heads=) as `IMFDiT`, with attribute `num_classes`. It
                is called once under no_grad with heads="v" for the guidance, and once for training.
            x: (B, C, H, W) data.
            noise: (B, C, H, W) noise e.
            t, r: (B,) times in [0, 1], r <= t. Their number of rows with r ≠ t is read on the host.
            y: (B,) integer labels.
            drop: (B,) bool, True where the label is dropped; default: nowhere.
            omega: (B,) guidance scales, at least 1.
            t_min, t_max: (B,) ends of the guided interval; rows with r = t have [0, 1] whatever is given.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_draws(net, x, y, noise, t=t, r=r, drop=drop, omega=omega, t_min=t_min, t_max=t_max)
        check_times(t, r)
        check_finite("noise", noise)
        if not bool((omega >= 1).all()):  # NaN fails too
            raise ValueError("omega: expected at least 1 in every row")
        for name, a in (("omega", omega), ("t_min", t_min), ("t_max", t_max)):
            check_finite(name, a)
        return self._loss(net, x, noise, t, r, y, drop, omega, t_min, t_max, *rows_first(t, r))

    def _loss(
        self,
        net: Net,
        x: Tensor,
        e: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        drop: Tensor | None,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        order: Tensor,
        rows: int,
    ) -> ImprovedMeanFlowOutput:
        """`order` puts the `rows` samples with r ≠ t first; only those carry tangents."""
        check_takes(net, "y", "omega", "t_min", "t_max", "heads")
        back = order.argsort()
        x, e, t, r, y, omega, t_min, t_max = (a[order] for a in (x, e, t, r, y, omega, t_min, t_max))
        t_ = column(t.to(x.dtype), x)  # [B, 1, 1, 1]
        z = (1 - t_) * x + t_ * e  # [B, C, H, W]
        v = e - x  # [B, C, H, W]
        null = torch.full_like(y, net_num_classes(net))  # [B]
        drop = torch.zeros_like(y, dtype=torch.bool) if drop is None else drop[order]  # [B]
        y_in = torch.where(drop, null, y)  # [B]
        t_min = torch.cat([t_min[:rows], torch.zeros_like(t_min[rows:])])  # [B]
        t_max = torch.cat([t_max[:rows], torch.ones_like(t_max[rows:])])  # [B]
        omega_eff = torch.where((t_min <= t) & (t <= t_max), omega, torch.ones_like(omega))  # [B]

        with torch.no_grad():
            # v_u of every row and, where r ≠ t, v_c: one forward of the shared blocks and the v head
            z2, t2, y2 = torch.cat([z, z[:rows]]), torch.cat([t, t[:rows]]), torch.cat([null, y[:rows]])
            omega2 = torch.cat([torch.ones_like(omega), omega_eff[:rows]])  # [B + rows]
            whole = {"t_min": torch.zeros_like(t2), "t_max": torch.ones_like(t2)}
            _, velocities = _pair(net(z2, t2, t2, y2, omega=omega2, **whole, heads="v"))
            velocities = check_velocity("v", velocities, z2).to(v.dtype)  # [B + rows, C, H, W]
            v_u, v_c = velocities.split([len(z), rows])  # [B, C, H, W], [rows, C, H, W]
            forget_autocast(z.device)

        conditions: dict[str, Any] = {"omega": omega, "t_min": t_min, "t_max": t_max}
        if rows > 0:
            tangents = (v_c, torch.zeros_like(r[:rows]), torch.ones_like(t[:rows]))
            out, out_dot = jvp(net, (z, r, t), tangents, y=y_in, **conditions)
            (u, v_head), (du_dt, _) = _pair(out), out_dot  # [B, C, H, W], du: [rows, …]
        else:
            (u, v_head), du_dt = _pair(net(z, r, t, y_in, **conditions)), torch.zeros_like(z[:0])
        u, v_head = check_velocity("u", u, z), check_velocity("v", v_head, z)
        with torch.no_grad():
            # where r = t and the label is kept, the training forward's v head is v_c itself
            v_c = torch.cat([v_c, v_head[rows:].to(v.dtype)])  # [B, C, H, W]
            weight = (1 - 1 / omega_eff).masked_fill(drop, 0.0)  # [B]; a row without label is not guided
            v_g = v + column(weight.to(v.dtype), v) * (v_c - v_u)  # [B, C, H, W]

        norm: dict[str, Any] = {"p": self.norm_p, "eps": self.norm_eps}
        wide = torch.promote_types(t.dtype, torch.float32)  # a difference of half-precision times needs more bits
        loss_u = adaptive_squared_error(u, v_g, du_dt.to(u.dtype), t.to(wide) - r.to(wide), **norm)
        loss_v = adaptive_squared_error(v_head, v_g, **norm)
        per_sample = loss_u.per_sample + loss_v.per_sample  # [B]
        full_du_dt = torch.cat([du_dt, du_dt.new_zeros(u.shape[0] - rows, *u.shape[1:])])  # [B, C, H, W]
        return ImprovedMeanFlowOutput(
            loss=per_sample.mean(),
            per_sample=per_sample.detach()[back],
            squared_error=loss_u.squared_error[back],
            u=u.detach()[back],
            du_dt=full_du_dt[back],
            v=v_g[back],
            t=t[back],
            r=r[back],
            v_head=v_head.detach()[back],
            squared_error_v=loss_v.squared_error[back],
            omega=omega[back],
            t_min=t_min[back],
            t_max=t_max[back],
        )


def _pair(out: Any) -> tuple[Any, Any]:
    """(u, v) of a network that returns both."""
    if not isinstance(out, tuple) or len(out) != 2:
        what = f"{len(out)} values" if isinstance(out, tuple) else type(out).__name__
        raise TypeError(f"net: expected it to return (u, v), as IMFDiT does, got {what}")
    return out[0], out[1]
