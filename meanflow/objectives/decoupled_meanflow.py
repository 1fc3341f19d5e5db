"""Decoupled MeanFlow (DMF, arXiv 2510.24474): flow matching and MeanFlow of every sample, weighted by a log-variance.

The network of the paper, whose first blocks are told t and whose last ones r, is the model "DMF-DiT".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_velocity
from ..options import choice, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .arguments import check_mix
from .objective import Networks, Objective, Terms
from .rows import Rows
from .rules import total_derivative
from .time_samplers import LogitNormal, TimeSampler
from .velocities import guided_velocity, with_own
from .weights import LogVariance, mean_square, squared_norm


@register("objectives", "dmf")
@dataclass(frozen=True)
class DecoupledMeanFlow(Objective):
    """½(L_FM + L_MF), each ln(mean Δ²·e^(−λ) + 0.01) + λ with a learned λ(t, r), with times and noise of their own.

    The velocity of both is v_g = v + omega·(u(z,t,t|y) − u(z,t,t|∅)), but for samples without their label.

    Args:
        omega: guidance in the target; 0 is none
        guidance_interval: closed interval of times at which the target is guided
        label_dropout: share of samples trained without their label, in [0, 1]
        released: weigh every error with every sample's λ, as the authors' released program does; then a batch that is
            cut into parts gives other losses
        time_sampler: how t of the MeanFlow half is drawn
        r_sampler: how r is drawn; the larger of both is t
        fm_sampler: how the time of the flow-matching half is drawn
        sampling: how images are drawn
    """

    paper = ("2510.24474",)
    formula = "u(z, t, t) → v_g and u → v_g − (t − r)·du/dt, of each sample"
    ratio = 1.0
    conditions = ("t_fm", "noise_fm")

    omega: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 0.7)
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    released: bool = False
    time_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(0.4, 1.0), prefix="time_")
    r_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(-1.2, 1.0), prefix="r_")
    fm_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(0.0, 1.0), prefix="fm_")
    sampling: Sampling = sampler_option(FewSteps)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mix(self)

    def learned_module(self) -> nn.Module:
        """λ(t, r)."""
        return LogVariance(times=2)

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """t and r of the MeanFlow half."""
        t = self.time_sampler.sample(n, generator=generator, device=device)  # [B]
        r = self.r_sampler.sample(n, generator=generator, device=device)  # [B]
        return torch.maximum(t, r), torch.minimum(t, r)

    def draw_noises(self, noise: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The noise of the flow-matching half."""
        return {"noise_fm": torch.randn(noise.shape, generator=generator, device=noise.device, dtype=noise.dtype)}

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The time of the flow-matching half."""
        return {"t_fm": self.fm_sampler.sample(len(t), generator=generator, device=t.device)}

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """Both halves in one pass, the second with r = t."""
        assert nets.learned is not None
        B = len(b.z)
        both = b.joined(b.at(b.conditions["t_fm"], noise=b.conditions["noise_fm"]))  # 2·B rows
        v_g = both.v  # [2·B, …]
        if self.omega != 0.0:
            low, high = self.guidance_interval
            active = (both.t >= low) & (both.t <= high)  # [2·B]
            active = active if both.drop is None else active & ~both.drop
            v_g, w_label = guided_velocity(both, active, data=1.0, label=self.omega, null=-self.omega)
        pair = total_derivative(both, v_g)
        u, u_tgt = check_velocity("u", pair.u, both.z), pair.u_tgt  # [2·B, …]
        if self.omega != 0.0:
            v_g = with_own(both, v_g, w_label, u)
            u_tgt = with_own(both, u_tgt, w_label, u)
        q, λ = mean_square(u - u_tgt), nets.learned(both.t, both.r)  # [2·B] each
        mf, fm = (self._weighted(*pair) for pair in zip(q.chunk(2), λ.chunk(2), strict=True))  # [B] each
        metrics = {"squared_error": squared_norm((u.detach() - u_tgt)[:B])}
        others = {"u_tgt": u_tgt[:B], "v_fm": u[B:], "v_g_fm": v_g[B:], "loss_fm": fm, "loss_mf": mf}
        others |= {"log_variance_mf": λ[:B], "log_variance_fm": λ[B:]}
        return Terms((fm + mf) / 2, metrics, u[:B], pair.du_dt, v_g[:B], others)

    def _weighted(self, q: Tensor, λ: Tensor) -> Tensor:
        """ln(q·e^(−λ) + 0.01) + λ, (B,)."""
        if self.released:
            return ((q[None, :] * (-λ).exp()[:, None] + 0.01).log() + λ[:, None]).mean(dim=1)
        return (q * (-λ).exp() + 0.01).log() + λ
