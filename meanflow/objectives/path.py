"""The path between data and noise, and the clocks and scales in which other papers write it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def column(a: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …) of the rank of `like`."""
    return a.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class LinearPath:
    """z_t = (1 − t) x + t e from data x at t = 0 to noise e at t = 1, with velocity v = e − x (arXiv 2210.02747).

    Args:
        floor: share of the noise that is left at t = 0: e times t + floor·(1 − t).
    """

    floor: float = 0.0

    def given(self, conditions: Mapping[str, Tensor]) -> LinearPath:
        """The path of samples with these draws, (B,) or (B, …) by name; it depends on none."""
        return self

    def point(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """z_t, (B, …), at times t (B,)."""
        t_ = column(t.to(x.dtype), x)  # [B, 1, …]
        if self.floor == 0.0:
            return (1 - t_) * x + t_ * e
        return (1 - t_) * x + (t_ + self.floor * (1 - t_)) * e

    def denoised(self, u: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """z − t·u, (B, …): the image at the end of u(z, 0, t); of a velocity u(z, t, t) the mean of the data."""
        return z - column(t.to(z.dtype), z) * u

    def between(self, x: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """z_s, (B, …), with the data x and the noise of z_t, t > 0 (DDIM, arXiv 2010.02502)."""
        t_, s_ = column(t.to(z.dtype), z), column(s.to(z.dtype), z)  # [B, 1, …] each
        return (1 - s_) * x + s_ * ((z - (1 - t_) * x) / t_)

    def velocity(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """dz_t/dt given x and e, (B, …)."""
        return e - x if self.floor == 0.0 else (1 - self.floor) * e - x


@dataclass(frozen=True)
class BridgePath(LinearPath):
    """z_t = (1 − t) x + t e + γ(t) ξ with noise ξ ~ N(0, I) of each sample: a Brownian bridge from data to noise.

    γ(t) = σ·√(t(1 − t)) (arXiv 2307.03672; 2303.08797, §3.4 with a = σ²). Its derivative, a part of the velocity e − x
    + γ'(t) ξ, would be infinite at both ends. So γ is a straight line to 0 there, over times of length `end`: the
    velocity is that of the path at every time, and |γ'| at most σ·√((1 − end)/end). Data at t = 0 and noise at t = 1
    are as on the linear path.

    Args:
        sigma: σ.
        end: in (0, 1/2].
        noise: (B, …) ξ, see `given`.
    """

    sigma: float = 0.0
    end: float = 0.01
    noise: Tensor | None = field(default=None, compare=False, repr=False)

    def given(self, conditions: Mapping[str, Tensor]) -> BridgePath:
        """The path of samples whose ξ is the draw "bridge_noise"."""
        return replace(self, noise=conditions["bridge_noise"])

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """γ and its derivative at times t, (B,) each."""
        inner, slope = t.clamp(self.end, 1 - self.end), self.sigma * ((1 - self.end) / self.end) ** 0.5
        root = (inner * (1 - inner)).sqrt()  # [B]
        near = torch.minimum(t, 1 - t)  # [B], time to the next end
        straight = near < self.end
        rate = torch.where(straight, slope * (1 - 2 * t).sign(), self.sigma * (1 - 2 * inner) / (2 * root))
        return torch.where(straight, slope * near, self.sigma * root), rate

    def point(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """z_t, (B, …), at times t (B,)."""
        return super().point(x, e, t) + column(self.gamma(t.to(x.dtype))[0], x) * self._ξ(x)

    def velocity(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """dz_t/dt given x, e and ξ, (B, …)."""
        return super().velocity(x, e, t) + column(self.gamma(t.to(x.dtype))[1], x) * self._ξ(x)

    def between(self, x: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """z_s, (B, …), with the data x and both noises of z_t, t > 0."""
        at_t, at_s = (column(self.gamma(a.to(z.dtype))[0], z) * self._ξ(z) for a in (t, s))  # [B, …] each
        return super().between(x, z - at_t, t, s) + at_s

    def _ξ(self, x: Tensor) -> Tensor:
        if self.noise is None or self.noise.shape != x.shape:
            got = "none" if self.noise is None else tuple(self.noise.shape)
            raise ValueError(f"bridge_noise: expected the shape of x, {tuple(x.shape)}, got {got}")
        return self.noise.to(x.dtype)


class Clock(ABC):
    """Another way to write the same path: x_s = alpha(s)·x + sigma(s)·e at times s of its own.

    On the linear path that is the time t = sigma/(alpha + sigma) and the point z_t = x_s/(alpha + sigma).
    """

    @abstractmethod
    def alpha(self, s: Tensor) -> Tensor:
        """Scale of the data, (B,)."""

    @abstractmethod
    def sigma(self, s: Tensor) -> Tensor:
        """Scale of the noise, (B,)."""

    @abstractmethod
    def of_linear(self, t: Tensor) -> Tensor:
        """s at the linear path's time t, (B,)."""

    def to_linear(self, s: Tensor) -> Tensor:
        """The linear path's time t at s, (B,)."""
        return self.sigma(s) / (self.alpha(s) + self.sigma(s))

    def point(self, x_s: Tensor, s: Tensor) -> Tensor:
        """z_t, (B, …), of x_s at times s (B,)."""
        return x_s / column(self.alpha(s) + self.sigma(s), x_s)

    def state(self, z: Tensor, s: Tensor) -> Tensor:
        """x_s, (B, …), of z_t at times s (B,)."""
        return z * column(self.alpha(s) + self.sigma(s), z)


class Linear(Clock):
    """The linear path itself: s = t."""

    def alpha(self, s: Tensor) -> Tensor:
        return 1 - s

    def sigma(self, s: Tensor) -> Tensor:
        return s

    def of_linear(self, t: Tensor) -> Tensor:
        return t


class NoiseLevel(Clock):
    """x + σe at noise levels σ (arXiv 2206.00364): t = σ/(1 + σ)."""

    def alpha(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)

    def sigma(self, s: Tensor) -> Tensor:
        return s

    def of_linear(self, t: Tensor) -> Tensor:
        return t / (1 - t)


LEVELS = NoiseLevel()


@dataclass(frozen=True)
class Angle(Clock):
    """cos θ·x + sin θ·σ_d·e at angles θ in [0, π/2] (TrigFlow, arXiv 2410.11081).

    Args:
        sigma_data: σ_d, standard deviation of the data.
    """

    sigma_data: float = 1.0

    def alpha(self, s: Tensor) -> Tensor:
        return s.cos()

    def sigma(self, s: Tensor) -> Tensor:
        return self.sigma_data * s.sin()

    def of_linear(self, t: Tensor) -> Tensor:
        return torch.atan2(t, (1 - t) * self.sigma_data)

    def velocity(self, u: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """dx/dθ of the velocity u = dz/dt at z (B, …) and t (B,), (B, …): σ_d·F where u is a network's."""
        t_, data, Q = self._radius(z, t)  # [B, 1, …] each
        return u * Q - z * (t_ - self.sigma_data * data) / Q

    def tangent(self, u: Tensor, du_dt: Tensor, a: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """cos θ sin θ·dF/dθ, (B, …), of u and its total derivative along the velocity a at z (B, …) and t (B,)."""
        t_, data, Q = self._radius(z, t)  # [B, 1, …] each
        cos2 = (data / Q).square()  # [B, 1, …]
        whole = Q * ((1 - t_ - cos2) * (u - a) + (1 - t_) * t_ * du_dt)  # [B, …]
        return whole / self.sigma_data - data * t_ / Q.square() * z / Q

    def _radius(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t_ = column(t.to(z.dtype), z)  # [B, 1, …]
        data = self.sigma_data * (1 - t_)  # [B, 1, …]
        return t_, data, (data.square() + t_.square()).sqrt()


class Cosine(Clock):
    """cos(πs/2)·x + sin(πs/2)·e at times s in [0, 1]."""

    def alpha(self, s: Tensor) -> Tensor:
        return (s * (math.pi / 2)).cos()

    def sigma(self, s: Tensor) -> Tensor:
        return (s * (math.pi / 2)).sin()

    def of_linear(self, t: Tensor) -> Tensor:
        return torch.atan2(t, 1 - t) * (2 / math.pi)
