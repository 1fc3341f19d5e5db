"""The path between data and noise."""

from __future__ import annotations

from torch import Tensor


def column(a: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …) of the rank of `like`."""
    return a.view(-1, *[1] * (like.ndim - 1))


class LinearPath:
    """z_t = (1 − t) x + t e from data x at t = 0 to noise e at t = 1, with velocity v = e − x (arXiv 2210.02747)."""

    def point(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """z_t, (B, …), at times t (B,)."""
        t_ = column(t.to(x.dtype), x)  # [B, 1, …]
        return (1 - t_) * x + t_ * e

    def velocity(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """dz_t/dt given x and e, (B, …)."""
        return e - x
