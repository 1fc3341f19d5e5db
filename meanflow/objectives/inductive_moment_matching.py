"""Inductive moment matching (IMM, arXiv 2503.07565): groups of samples whose laws at r are to agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..options import choice, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .forms import Form, ScaledVelocity
from .objective import Networks, Objective, Terms
from .path import LEVELS
from .rows import Rows, forget_autocast
from .rules import moment_matching
from .weights import squared_norm


@register("objectives", "imm")
@dataclass(frozen=True)
class InductiveMomentMatching(Objective):
    """w·MMD² of X_{t→r}(z_t) and X⁻_{s→r}(z_s), with the same data and noise, over groups of samples that share times.

    w = sigmoid(b + 2·logit t)·(1 − t)^(a − 1)/(t·((1 − t)² + t²)), the kernel exp(−‖·‖/((t − r)·|c_out|·D)), c_out
    of the form.
    As in the paper, the samples of a group share their times, not their labels.

    Args:
        group_size: samples that share their times; the batch is a multiple
        weight_power: a of the weight
        weight_shift: b of the weight
        t_max: largest time
        t_min: least time
        gap_power: t and s differ by level_max/2^gap_power in noise level
        level_max: largest noise level t/(1 − t)
        label_dropout: share of samples trained without their label, in [0, 1]
        form: what the network returns
        sampling: how images are drawn
    """

    paper = ("2503.07565",)
    formula = "distribution of X_{t→r}(z_t) → that of X⁻_{s→r}(z_s), by MMD"
    ratio = 1.0
    conditions = ("s",)

    group_size: int = option(4, low=1)
    weight_power: int = option(1, low=1, high=2)
    weight_shift: float = 4.0
    t_max: float = option(0.994, low=0.0, high=1.0, above=True)
    t_min: float = option(0.0, low=0.0, high=1.0)
    gap_power: int = option(12, low=1)
    level_max: float = option(160.0, low=0.0, above=True)
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    form: Form = choice("forms", ScaledVelocity, prefix="form_")
    sampling: Sampling = sampler_option(partial(FewSteps, t_start=0.994))

    instantaneous = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min >= self.t_max:
            raise UsageError(f"expected less than t_max = {self.t_max}, got {self.t_min}", field="t_min")

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """t uniform, and r uniform below it; the same in a group."""
        if n % self.group_size:
            raise UsageError(f"expected a divisor of the batch, {n}, got {self.group_size}", field="group_size")
        shares = torch.rand(2, n // self.group_size, generator=generator, device=device)  # [2, B/M]
        t = self.t_min + (self.t_max - self.t_min) * shares[0]  # [B/M]
        t = t.clamp_min(self.t_min + 1e-3)
        r = self.t_min + (t - self.t_min) * shares[1]  # [B/M]
        r = torch.minimum(r, t - 2e-4)
        return t.repeat_interleave(self.group_size), r.repeat_interleave(self.group_size)

    def draw_conditions(
        self, t: Tensor, r: Tensor, *, step: int = 0, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """s between r and t, a noise level of level_max/2^gap_power below t."""
        level = (LEVELS.of_linear(t) - self.level_max / 2**self.gap_power).clamp_min(0.0)  # [B]
        s = torch.minimum(LEVELS.to_linear(level), t - 1e-4)  # [B]
        return {"s": torch.maximum(s, r)}

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """w·MMD²."""
        if len(b.z) % self.group_size:
            raise ValueError(f"x: expected a multiple of group_size = {self.group_size} samples, got {len(b.z)}")
        s = b.conditions["s"]  # [B]
        u = b.predict()  # [B, …]
        y = b.z - b.gap * u  # [B, …], X_{t→r}(z_t)
        with torch.no_grad():
            near = b.at(s, b.r)
            other = near.z - near.gap * near.predict()  # [B, …], X⁻_{s→r}(z_s)
            forget_autocast(b.z.device)
        c_out: Any = self.form.coefficients(b.t)[2]
        scale = 1 / ((b.t - b.r) * abs(c_out))  # [B]
        distance = moment_matching(y, other, group=self.group_size, scale=scale)  # [B]
        metrics = {"squared_error": squared_norm(y.detach() - other)}
        return Terms(self.weight(b.t).to(y.dtype) * distance, metrics, u, None, b.v, {"y": y, "y_tgt": other})

    def weight(self, t: Tensor) -> Tensor:
        """w at times t, (B,)."""
        logit = t.log() - (1 - t).log()  # [B]
        norm = t * ((1 - t).square() + t.square())  # [B]
        return torch.sigmoid(self.weight_shift + 2 * logit) * (1 - t) ** (self.weight_power - 1) / norm
