"""What a network returns, as the average velocity u: every parametrisation of the field is one of these wrappers.

u = c_z(t)·z + c_out(t)·F(c_in(t)·z, r', t', y), with coefficients of t alone, whatever r is. The objectives and
samplers know u only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from mfkernels import TensorOrDual, is_dual_aware, linear_map
from mfkernels.dual import map_output, primal_of

from ..options import Options, option
from ..registry import register
from .elementwise import arctan_ratio, clamp, log, reciprocal, sqrt
from .path import column

# c_in, c_z and c_out: (B,), or the same for all
Coefficients = tuple[TensorOrDual | float, TensorOrDual | float, TensorOrDual | float]
_LEAST = 1e-6  # times are kept so far from 0 and 1 where their logarithm is taken


@dataclass(frozen=True)
class Form(Options, ABC):
    """What a network returns, and which times it is told.

    Args:
        times: t, the logarithm of the noise level t/(1 − t), the angle arctan(t/((1 − t)·sigma_data)), or the share
            2/π·arctan(t/(1 − t)) of the cosine path
        time_scale: factor of these times
        one_time: the network is told t alone: in the place of r it is given t
    """

    sigma_data: ClassVar[float] = 1.0

    times: Literal["t", "log_sigma", "angle", "cosine"] = "t"
    time_scale: float = 1.0
    one_time: bool = False

    @abstractmethod
    def coefficients(self, t: TensorOrDual) -> Coefficients:
        """c_in, c_z and c_out at times t (B,), with their derivatives where t is a Dual.

        Dual has arithmetic; what else there is of functions is in `meanflow.objectives.elementwise`.
        """

    def clock(self, t: TensorOrDual) -> TensorOrDual:
        """What the network is told of times t (B,), (B,)."""
        if self.times == "log_sigma":
            t = clamp(t, _LEAST, 1 - _LEAST)
            t = log(t) - log(1 - t)  # [B]
        elif self.times == "angle":
            t = arctan_ratio(t, (1 - t) * self.sigma_data)  # [B]
        elif self.times == "cosine":
            t = arctan_ratio(t, 1 - t) * (2 / math.pi)  # [B]
        return t if self.time_scale == 1.0 else self.time_scale * t

    def told(self, r: TensorOrDual, t: TensorOrDual) -> tuple[TensorOrDual, TensorOrDual]:
        """What the network is given in the place of r and t, (B,) each."""
        now = self.clock(t)  # [B]
        return (now if self.one_time else self.clock(r)), now

    def wrap(self, net: Callable[..., Any]) -> Callable[..., Any]:
        """u(z, r, t, y) of a network of this form; dual-aware if that is."""
        return Wrapped(self, net)

    def output_of(self, u: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """F, what the network returned where u is the average velocity at z (B, …) and t (B,)."""
        _, c_z, c_out = (_column(c, z) for c in self.coefficients(t))  # [B, 1, …] each
        return (u - c_z * z) / c_out


@register("forms", "average_velocity")
@dataclass(frozen=True)
class AverageVelocity(Form):
    """The network returns u itself (MeanFlow, α-Flow, DMF, TVM, AYF, flow map matching)."""

    def coefficients(self, t: TensorOrDual) -> Coefficients:
        """1, 0, 1."""
        return 1.0, 0.0, 1.0

    def wrap(self, net: Callable[..., Any]) -> Callable[..., Any]:
        """The network as it is, or told other times."""
        plain = self.times == "t" and self.time_scale == 1.0 and not self.one_time
        return net if plain else Wrapped(self, net)


@register("forms", "data")
@dataclass(frozen=True)
class DataPrediction(Form):
    """The network returns the data x̂, and u = (z − x̂)/max(t, t_min) (pixel MeanFlow, arXiv 2601.22158).

    Args:
        t_min: times below it are taken for it where one divides by them
    """

    t_min: float = option(0.05, low=0.0, high=1.0, above=True)

    def coefficients(self, t: TensorOrDual) -> Coefficients:
        """1, 1/t, −1/t."""
        c = reciprocal(clamp(t, self.t_min, 1.0))  # [B]
        return 1.0, c, -c


@register("forms", "edm")
@dataclass(frozen=True)
class EDM(Form):
    """EDM's preconditioned network (arXiv 2206.00364, table 1), which sees z/√(σ_d²(1 − t)² + t²).

    Args:
        sigma_data: standard deviation σ_d of the data
        sigma_min: noise level at which the denoised image is the input itself, as in consistency models (arXiv
            2303.01469, appendix C); with 0 the coefficients are EDM's
    """

    sigma_data: float = option(0.5, low=0.0, above=True)  # type: ignore[misc]
    sigma_min: float = option(0.0, low=0.0)
    times: Literal["t", "log_sigma", "angle", "cosine"] = "log_sigma"
    time_scale: float = 0.25
    one_time: bool = True

    def coefficients(self, t: TensorOrDual) -> Coefficients:
        """c_skip = σ_d²/((σ − σ_min)² + σ_d²) and c_out = (σ − σ_min)σ_d/√(σ² + σ_d²) with σ = t/(1 − t), for u."""
        data = (1 - t) * self.sigma_data  # [B]
        square = data * data + t * t  # [B], Q²
        c_in = reciprocal(sqrt(square))  # [B]
        if self.sigma_min == 0.0:
            return c_in, (t - self.sigma_data * data) * reciprocal(square), -self.sigma_data * c_in
        t = clamp(t, self.sigma_min / (1 + self.sigma_min), 1.0)  # below, 1/t would be infinite at 0
        above, per_t = t - (1 - t) * self.sigma_min, reciprocal(t)  # [B] each
        c_z = (above * above * per_t - self.sigma_data * data) * reciprocal(above * above + data * data)  # [B]
        return c_in, c_z, -self.sigma_data * (above * per_t * c_in)


@register("forms", "trigflow")
@dataclass(frozen=True)
class TrigFlow(Form):
    """TrigFlow's network, σ_d·F the velocity dx/dθ (arXiv 2410.11081); IMM's "simple-EDM" with sigma_data 1.

    Args:
        sigma_data: standard deviation σ_d of the data
    """

    sigma_data: float = option(0.5, low=0.0, above=True)  # type: ignore[misc]
    times: Literal["t", "log_sigma", "angle", "cosine"] = "angle"
    one_time: bool = True

    def coefficients(self, t: TensorOrDual) -> Coefficients:
        """EDM's with the sign of F turned."""
        data = (1 - t) * self.sigma_data  # [B]
        square = data * data + t * t  # [B], Q²
        c_in = reciprocal(sqrt(square))  # [B]
        return c_in, (t - self.sigma_data * data) * reciprocal(square), self.sigma_data * c_in


@register("forms", "imm")
@dataclass(frozen=True)
class ScaledVelocity(Form):
    """u = σ_d·F(z/(σ_d·√((1 − t)² + t²))): IMM's Euler-FM (arXiv 2503.07565), for data and noise of deviation σ_d.

    Args:
        sigma_data: standard deviation σ_d of data and noise
        kind: euler_fm, or simple_edm with u = (2t − 1)/N²·z + σ_d/N·F and N = √((1 − t)² + t²)
    """

    sigma_data: float = option(1.0, low=0.0, above=True)  # type: ignore[misc]
    kind: Literal["euler_fm", "simple_edm"] = "euler_fm"
    time_scale: float = 1000.0

    def coefficients(self, t: TensorOrDual) -> Coefficients:
        """1/(σ_d·N), 0, σ_d."""
        square = (1 - t) * (1 - t) + t * t  # [B], N²
        per_N = reciprocal(sqrt(square))  # [B]
        if self.kind == "euler_fm":
            return per_N * (1 / self.sigma_data), 0.0, self.sigma_data
        return per_N * (1 / self.sigma_data), (2 * t - 1) * reciprocal(square), self.sigma_data * per_N


@register("forms", "shortcut")
@dataclass(frozen=True)
class Shortcut(Form):
    """Networks of Shortcut models (arXiv 2410.12557): s(z, τ, k) = −u with τ = 1 − t and steps of 2^−k = t − r.

    The network is given k in the place of r, and τ in that of t.

    Args:
        timesteps: one over the smallest step, which is taken for none
    """

    timesteps: int = option(128, low=2)

    def coefficients(self, t: TensorOrDual) -> Coefficients:
        """1, 0, −1."""
        return 1.0, 0.0, -1.0

    def told(self, r: TensorOrDual, t: TensorOrDual) -> tuple[TensorOrDual, TensorOrDual]:
        """k and τ."""
        return log(clamp(t - r, 1 / self.timesteps, 1.0)) * (-1 / math.log(2)), 1 - t


class Wrapped:
    """u(z, r, t, y, …) of a network in a form."""

    def __init__(self, form: Form, net: Callable[..., Any]) -> None:
        self.form, self.module = form, net
        self.__dual_aware__ = is_dual_aware(net)

    def __call__(self, z: TensorOrDual, r: TensorOrDual, t: TensorOrDual, y: Tensor, **conditions: Any) -> Any:
        """The average velocity, (B, …), or all outputs of the network as velocities."""
        c_in, c_z, c_out = (_column(c, z) for c in self.form.coefficients(t))  # [B, 1, …] each
        r_, t_ = self.form.told(r, t)  # [B] each
        out = self.module(z * c_in, r_, t_, y, **conditions)
        return map_output(lambda F: F if F is None else z * c_z + F * c_out, out)


def _column(a: TensorOrDual | float, like: TensorOrDual) -> Any:
    """(B,) numbers to be multiplied with images."""
    p = primal_of(like)
    return a if isinstance(a, float) else linear_map(lambda a: column(a.to(p.dtype), p), a)
