"""Consistency training and distillation (arXiv 2303.01469), and improved consistency training (arXiv 2310.14189).

f(z, t) = z − t·u(z, 0, t) is trained to be the same at two neighbouring noise levels of a grid, t = σ_n/(1 + σ_n) and
s = σ_{n+1}/(1 + σ_{n+1}): f(z_t, t) − f⁻(z_s, s) = −t·(u − u_tgt), u_tgt that of a composition with r = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from ..options import choice, option
from ..registry import register
from ..sampling import ConsistencySteps, Sampling, sampler_option
from .forms import EDM, Form
from .objective import Networks, Objective, Terms
from .pairs import SIGMA_MAX, cumulative_normal, doubling_scales, growing_scales, karras_levels
from .path import LEVELS
from .rows import Rows
from .rules import Pair, composition
from .velocities import heun_step
from .weights import pseudo_huber, squared_norm

LEAST_GAP = 1e-9  # of two noise levels, by which one divides
SAMPLER = partial(ConsistencySteps, steps=1, t_start=SIGMA_MAX, start="scaled", sigma_min=0.002, clip=True)


@dataclass(frozen=True)
class Consistency(Objective):
    """What consistency training, its improved version and distillation have in common: pairs of a grid of noise levels.

    Args:
        sigma_min: least noise level, at which f is the identity
        sigma_max: largest noise level
        rho: the grid is even in σ^(1/rho)
        start_scales: intervals of the grid at first
        end_scales: and in the end
        total_steps: steps of the curriculum
        label_dropout: share of samples trained without their label, in [0, 1]
        form: what the network returns
        sampling: how images are drawn
    """

    ratio = 1.0
    conditions = ("s",)
    curriculum = ("total_steps",)

    sigma_min: float = option(0.002, low=0.0, above=True)
    sigma_max: float = option(80.0, low=0.0, above=True)
    rho: float = option(7.0, low=1.0)
    start_scales: int = option(2, low=2)
    end_scales: int = option(150, low=2)
    total_steps: int = option(800_000, low=1)
    label_dropout: float = option(0.0, low=0.0, high=1.0)
    form: Form = choice("forms", lambda: EDM(sigma_min=0.002, time_scale=250.0), prefix="form_")
    sampling: Sampling = sampler_option(SAMPLER)

    instantaneous = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise UsageError(
                f"expected less than sigma_max = {self.sigma_max}, got {self.sigma_min}", field="sigma_min"
            )
        if self.start_scales > self.end_scales:
            raise UsageError(
                f"expected at most end_scales = {self.end_scales}, got {self.start_scales}", field="start_scales"
            )
        if isinstance(self.form, EDM) and self.form.sigma_min not in (0.0, self.sigma_min):
            raise UsageError(
                f"expected 0 or sigma_min = {self.sigma_min}, got {self.form.sigma_min}", field="form_sigma_min"
            )

    def scales(self, step: int) -> int:
        """N(k), the number of levels in the grid at a step."""
        return growing_scales(self._progress(step), **self._growth()) + 1

    def _progress(self, step: int) -> int:
        return min(step, self.total_steps)

    def _growth(self) -> dict[str, int]:
        return {"first": self.start_scales, "last": self.end_scales, "total": self.total_steps}

    def levels(self, index: Tensor, scales: int) -> Tensor:
        """Noise levels of the grid by index, (n,) float, the noisiest first."""
        return karras_levels(index / (scales - 1), sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    def draw_index(
        self, n: int, scales: int, *, generator: torch.Generator | None, device: torch.device | str
    ) -> Tensor:
        """Indices (n,) of the noisier levels of n pairs."""
        return torch.randint(scales - 1, (n,), generator=generator, device=device)

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """t of a level of the grid, and r = 0."""
        scales = self.scales(step)
        index = self.draw_index(n, scales, generator=generator, device=device)  # [B]
        t = LEVELS.to_linear(self.levels(index.double(), scales)).float()  # [B]
        return t, torch.zeros_like(t)

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """s of the next level of the grid."""
        scales = self.scales(step)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        place = (LEVELS.of_linear(t.double()) ** (1 / self.rho) - high) / (low - high)  # [B]
        index = (place * (scales - 1)).round() + 1  # [B]
        return {"s": LEVELS.to_linear(self.levels(index, scales)).to(t.dtype)}


@register("objectives", "ct")
@dataclass(frozen=True)
class ConsistencyTraining(Consistency):
    """Consistency training (arXiv 2303.01469, algorithm 3): λ(σ)·d(f(z_t, t), f⁻(z_s, s)), f⁻ an average of f.

    The perceptual distance LPIPS, with which the authors train on images, is not among the distances.

    Args:
        start_ema: decay of the average at first
        distance: mean square or mean absolute difference
        weight: λ: 1, σ^−2 + σ_d^−2, or σ^−2 + 1
    """

    paper = ("2303.01469",)
    formula = "f(z_t, t) → f⁻(z_s, s), s the next level of a grid, f⁻ averaged"

    start_ema: float = option(0.9, low=0.0, high=1.0, above=True, below=True)
    distance: Literal["l2", "l1"] = "l2"
    weight: Literal["uniform", "karras", "snr+1"] = "uniform"

    def target_decay(self, step: int) -> float | None:
        """exp(s₀·ln μ₀/(N(k) − 1)) (appendix C)."""
        return math.exp(self.start_scales * math.log(self.start_ema) / (self.scales(step) - 1))

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """λ·d(f, f⁻)."""
        pair = composition(b, self.step_velocity(b, nets), b.conditions["s"], second=nets.ema or b.net)
        jump = b.column(b.t) * (pair.u - pair.u_tgt)  # [B, …], f⁻ − f
        away = jump.square() if self.distance == "l2" else jump.abs()
        per_sample = self.weight_at(b.t).to(jump.dtype) * away.flatten(1).mean(dim=1)  # [B]
        return consistency_terms(b, pair, per_sample)

    def step_velocity(self, b: Rows, nets: Networks) -> Tensor:
        """That which leads from z_t to z_s, (B, …)."""
        return b.v

    def weight_at(self, t: Tensor) -> Tensor:
        """λ at times t, (B,)."""
        if self.weight == "uniform":
            return torch.ones_like(t)
        add = self.form.sigma_data**-2 if self.weight == "karras" else 1.0
        return LEVELS.of_linear(t) ** -2 + add


@register("objectives", "cd")
@dataclass(frozen=True)
class ConsistencyDistillation(ConsistencyTraining):
    """Consistency distillation (arXiv 2303.01469, algorithm 2): z_s by one Heun step of a frozen flow.

    Args:
        start_scales, end_scales: intervals of the grid
        start_ema: decay of the average
    """

    paper = ("2303.01469",)
    formula = "f(z_t, t) → f⁻(z_s, s), z_s a teacher's Heun step from z_t, f⁻ averaged"
    teachers = ("frozen",)

    start_scales: int = option(39, low=2)
    end_scales: int = option(39, low=2)
    start_ema: float = option(0.95, low=0.0, high=1.0, above=True, below=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_scales != self.end_scales:
            raise UsageError(
                f"expected end_scales = {self.end_scales}: the grid stays; got {self.start_scales}",
                field="start_scales",
            )

    def scales(self, step: int) -> int:
        """The same at every step."""
        return self.end_scales + 1

    def target_decay(self, step: int) -> float | None:
        """The same at every step."""
        return self.start_ema

    @torch.no_grad()
    def step_velocity(self, b: Rows, nets: Networks) -> Tensor:
        """(z_t − z_s)/(t − s) of the Heun step."""
        assert nets.frozen is not None
        s = b.conditions["s"]  # [B]
        gap = torch.where(b.t > s, b.t - s, torch.ones_like(s))  # [B]
        return (b.z - heun_step(nets.frozen, b.z, b.y, b.t, s)) / b.column(gap)  # [B, …]


@register("objectives", "ict")
@dataclass(frozen=True)
class ImprovedConsistencyTraining(Consistency):
    """Improved consistency training (arXiv 2310.14189): no average, pseudo-Huber, levels near a log-normal.

    Args:
        sigma_mean: of ln σ, about which levels are drawn
        sigma_std: of ln σ
        huber_scale: c of the pseudo-Huber distance over √D, D numbers a sample
    """

    paper = ("2310.14189",)
    formula = "f(z_t, t) → f⁻(z_s, s), pseudo-Huber, the grid doubles in stages"

    start_scales: int = option(10, low=2)
    end_scales: int = option(1280, low=2)
    total_steps: int = option(400_000, low=1)
    sigma_mean: float = -1.1
    sigma_std: float = option(2.0, low=0.0, above=True)
    huber_scale: float = option(0.00054, low=0.0)

    def scales(self, step: int) -> int:
        """N(k): doubled in equal parts of the training."""
        return doubling_scales(self._progress(step), **self._growth())

    def draw_index(
        self, n: int, scales: int, *, generator: torch.Generator | None, device: torch.device | str
    ) -> Tensor:
        """With the share of the log-normal that is between a level and the next (eq. 10)."""
        levels = self.levels(torch.arange(scales, device=device, dtype=torch.float64), scales)  # [N]
        below = cumulative_normal((levels.log() - self.sigma_mean) / self.sigma_std)  # [N]
        return torch.multinomial(below[:-1] - below[1:], n, replacement=True, generator=generator)

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """(√(‖f − f⁻‖² + c²) − c)/(σ_n − σ_{n+1})."""
        s = b.conditions["s"]  # [B]
        pair = composition(b, b.v, s, second=b.net)
        jump = b.column(b.t) * (pair.u - pair.u_tgt)  # [B, …]
        gap = (LEVELS.of_linear(b.t) - LEVELS.of_linear(s)).clamp_min(LEAST_GAP)  # [B]
        per_sample = pseudo_huber(jump, self.huber_scale * jump[0].numel() ** 0.5) / gap.to(jump.dtype)  # [B]
        return consistency_terms(b, pair, per_sample)


def consistency_terms(b: Rows, pair: Pair, per_sample: Tensor) -> Terms:
    """The terms of a pair whose loss compares denoised images; they are "f" and "f_tgt" among its results."""
    u, u_tgt = pair.u.detach(), pair.u_tgt
    t = b.column(b.t)  # [B, 1, …]
    others = {"u_tgt": u_tgt, "f": b.z - t * u, "f_tgt": b.z - t * u_tgt}
    return Terms(per_sample, {"squared_error": squared_norm(u - u_tgt)}, pair.u, pair.du_dt, b.v, others)
