"""Terminal velocity matching (TVM, arXiv 2511.19797): the velocity at the end of the flow map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_velocity
from ..errors import UsageError
from ..options import group, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .objective import Networks, Objective, Terms
from .rows import Net, Rows
from .rules import terminal_velocity
from .time_samplers import LogitNormal
from .weights import mean_square, squared_norm


@register("objectives", "tvm")
@dataclass(frozen=True)
class TerminalVelocityMatching(Objective):
    """‖β(∂X_{t→r}/∂r − F⁻(X, r, r))‖²/D + ‖β(F(z_q, q, q) − v_g)‖²/D, F⁻ an average of the network F, β = 1/ω.

    v_g = ω·v + (1 − ω)·F⁻(z_q, q, q | ∅), with the same data and noise at a time q of its own. A sample without its
    label has ω = 1.

    Args:
        omega: guidance scale ω, or the least one that is drawn
        omega_max: the largest that is drawn, uniformly; 0: all have omega
        conditioned: the network is told β, as the keyword beta (B,)
        scaled: F is ω times what the network returns
        detach_tangent: train u alone, with ∂u/∂r off the tape. The authors train through it, which here needs a network
            of plain PyTorch
        target_ema: of the averaged network
        gap_mean, gap_std: of the normal whose sigmoid t − r is
        r_sampler: how r is drawn, cut to r <= 1 − (t − r); and q
        label_dropout: share of samples trained without their label, in [0, 1]
        sampling: how images are drawn
    """

    paper = ("2511.19797",)
    formula = "∂X_{t→r}/∂r → F⁻(X, r, r), and F(z_q, q, q) → v_g, F⁻ averaged"
    ratio = 1.0
    conditions = ("q", "beta")

    omega: float = option(2.0, low=0.0, above=True)
    omega_max: float = option(0.0, low=0.0)
    conditioned: bool = False
    scaled: bool = False
    detach_tangent: bool = True
    target_ema: float = option(0.99, low=0.0, high=1.0, below=True)
    gap_mean: float = -0.8
    gap_std: float = option(1.0, low=0.0, above=True)
    r_sampler: LogitNormal = group(LogitNormal, prefix="r_")
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    sampling: Sampling = sampler_option(FewSteps)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.omega_max not in (0.0, self.omega):
            if self.omega_max < self.omega:
                raise UsageError(
                    f"expected 0 or more than omega = {self.omega}, got {self.omega_max}", field="omega_max"
                )
            if not self.conditioned:
                raise UsageError(
                    "expected 0 without conditioned: the network would not know the scale", field="omega_max"
                )

    @property
    def keywords(self) -> tuple[str, ...]:
        """What the network is told besides z, r, t and y."""
        return ("beta",) if self.conditioned else ()

    def target_decay(self, step: int) -> float | None:
        """The same at every step."""
        return self.target_ema

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """t − r the sigmoid of a normal, r logit-normal up to 1 − (t − r)."""
        normal = torch.randn(n, generator=generator, device=device)  # [B]
        gap = torch.sigmoid(self.gap_mean + self.gap_std * normal)  # [B]
        r = self.r_sampler.below(1 - gap, generator=generator)  # [B]
        return torch.minimum(r + gap, torch.ones_like(r)), r

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """q, and β = 1/ω."""
        q = self.r_sampler.sample(len(t), generator=generator, device=t.device)  # [B]
        omega = torch.full_like(t, self.omega)  # [B]
        if self.omega_max > self.omega:
            share = torch.rand(t.shape, generator=generator, device=t.device)  # [B]
            omega = omega + share * (self.omega_max - self.omega)
        return {"q": q, "beta": 1 / omega}

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """Both terms in one pass of the network, the second with r = t = q."""
        assert nets.ema is not None
        B, n, end = len(b.z), b.moved, nets.ema
        beta = b.conditions["beta"]  # [B]
        beta = beta if b.drop is None else torch.where(b.drop, torch.ones_like(beta), beta)
        others = b.at(b.conditions["q"])
        both = b.joined(others)  # 2·B rows
        factor = b.column(1 / beta)  # [B, 1, …], ω
        scale = factor if self.scaled else torch.ones_like(factor)  # [B, 1, …]
        along: Any = {"dr": 1.0, "dt": 0.0, "differentiable": not self.detach_tangent}
        out, dot = both.with_derivative(None, **along, **self._told(torch.cat([beta, beta])))
        F = check_velocity("u", out, both.z) * torch.cat([scale, scale])  # [2·B, …]
        du_dr = None if dot is None else dot * scale[:n]  # [moved, …]

        def averaged(z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return end(z, r, t, y, **self._told(beta[:n])) * scale[:n]

        pair = terminal_velocity(b, averaged, u=F[:B], du_dr=du_dr)
        v_g = self._guided(others, factor, end)  # [B, …]
        moved = (torch.arange(B, device=b.t.device) < n).to(F.dtype)  # [B]
        terminal = moved * mean_square(b.column(beta) * (pair.u - pair.u_tgt))  # [B]
        instantaneous = mean_square(b.column(beta) * (F[B:] - v_g))  # [B]
        metrics = {"squared_error": squared_norm((pair.u - pair.u_tgt).detach()) * moved}
        more = {"terminal": terminal, "instantaneous": instantaneous, "u_tgt": pair.u_tgt, "dX_dr": pair.u}
        more |= {"X": b.z - b.gap * F[:B].detach(), "v_q": F[B:], "v_g": v_g}
        return Terms(terminal + instantaneous, metrics, F[:B], du_dr, b.v, more)

    def sampled(self, net: Net) -> Net:
        """F of `omega`, the least guidance scale that is trained."""
        return self.sampled_at(net, self.omega)

    def sampled_at(self, net: Net, omega: float) -> Net:
        """F of a guidance scale, from which images are drawn."""

        return GuidedNetwork(self, net, omega)

    @torch.no_grad()
    def _guided(self, b: Rows, factor: Tensor, end: Net) -> Tensor:
        """ω·v + (1 − ω)·F⁻(z, q, q | ∅), (B, …)."""
        if self.omega == 1.0 and self.omega_max <= 1.0:
            return b.v
        null = end(b.z, b.t, b.t, torch.full_like(b.y, b.no_label), **self._told(torch.ones_like(b.t)))  # [B, …]
        return factor * b.v + (1 - factor) * check_velocity("u", null, b.z)

    def _told(self, beta: Tensor) -> dict[str, Any]:
        return {"beta": beta} if self.conditioned else {}


class GuidedNetwork:
    """F(z, r, t, y) of terminal velocity matching at one guidance scale."""

    def __init__(self, objective: TerminalVelocityMatching, net: Net, omega: float) -> None:
        self.objective, self.module, self.omega = objective, net, omega

    def __call__(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(B, …)."""
        told = {"beta": torch.full_like(t, 1 / self.omega)} if self.objective.conditioned else {}
        u = check_velocity("u", self.module(z, r, t, y, **told), z)
        return self.omega * u if self.objective.scaled else u
