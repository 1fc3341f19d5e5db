"""Averages of the weights with power-function profiles, and such averages of any length after the training.

T. Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2), arXiv 2312.02696, section 3
and appendix C. After t steps an average of profile p_γ(τ) = (γ + 1)·τ^γ / t^(γ+1) gives the weights of step s the part
(s^(γ+1) − (s − 1)^(γ+1)) / t^(γ+1), which is the profile's integral over the step. Its length is σ_rel, the profile's
standard deviation relative to t. A profile of another length is met by a combination of those of several steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from .ema import EMA

LONGEST = 12**-0.5  # σ_rel of γ = 0, the mean over all steps
PREFIX = "power:"  # of the name of such an average, before its σ_rel
Profile = tuple[float, float]  # σ_rel, and after how many steps


def power_name(sigma_rel: float) -> str:
    """What the average of a profile is called, in checkpoints and for `load_network`: "power:0.05"."""
    return f"{PREFIX}{float(sigma_rel)}"


def gamma_of(sigma_rel: float) -> float:
    """γ of a profile's length: the largest root of σ_rel² = (γ + 1) / ((γ + 2)²·(γ + 3)).

    Args:
        sigma_rel: in (0, `LONGEST`).

    Raises:
        ValueError: it is not.
    """
    if not 0.0 < sigma_rel < LONGEST:
        raise ValueError(f"sigma_rel: expected a number in (0, {LONGEST:.4f}), got {sigma_rel}")
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


class PowerEMA(EMA):
    """Averaged parameters in float32, w̄ ← β·w̄ + (1 − β)·w with β = (1 − 1/t)^(γ+1) after the t-th step.

    Args:
        model: whose `named_parameters` are averaged.
        sigma_rel: length of the profile.
        recordable: as of `EMA`.
    """

    def __init__(self, model: nn.Module, sigma_rel: float, *, recordable: bool = False) -> None:
        super().__init__(model, 0.0, recordable=recordable)
        self.exponent = gamma_of(sigma_rel) + 1.0

    def decay_at(self, step: int) -> float:
        """β after step `step`, which is counted from 0."""
        return (step / (step + 1)) ** self.exponent


def inner_product(a: Profile, b: Profile) -> float:
    """∫ p_a(τ)·p_b(τ) dτ of two profiles, in closed form (appendix C)."""
    (gamma_a, t_a), (gamma_b, t_b) = sorted(((gamma_of(a[0]), a[1]), (gamma_of(b[0]), b[1])), key=lambda p: p[1])
    # t_a <= t_b: a is zero after t_a, and b has (t_a / t_b)^γ_b of its height there
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (t_a / t_b) ** gamma_b / t_b


def combination(kept: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Factors whose combination of the profiles `kept` comes nearest to `wanted` (least squares, in float64).

    They add up to 1, so that weights keep their size. Those of the paper, whose networks do not depend on the size of
    their weights, need not.

    Returns:
        One factor for each profile, and ‖Σ x·p − p_wanted‖ / ‖p_wanted‖, how far the combination is from it.
    """
    norms = np.array([math.sqrt(inner_product(p, p)) for p in kept])  # [n]
    norm = math.sqrt(inner_product(wanted, wanted))
    gram = np.array([[inner_product(p, q) for q in kept] for p in kept]) / np.outer(norms, norms)  # [n, n]
    cosines = np.array([inner_product(p, wanted) for p in kept]) / (norms * norm)  # [n]
    sums = norm / norms  # [n]: what each adds to the sum, for profiles of norm one
    system = np.block([[gram, sums[:, None]], [sums, np.zeros(1)]])  # [n + 1, n + 1], with a Lagrange multiplier
    factors = np.linalg.solve(system, np.append(cosines, 1.0))[:-1]  # [n]
    missed = max(0.0, 1.0 - 2.0 * float(factors @ cosines) + float(factors @ gram @ factors))
    return [float(x) for x in factors * sums], math.sqrt(missed)
