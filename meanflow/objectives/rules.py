"""The rules that make a target of a flow map: each gives what is trained, on the tape, and where to, off it.

A flow map is X_{t→r}(z) = z − (t − r)·u(z, r, t), and a(z, t) a velocity: that of data and noise, guided or not, the
network's own, or a teacher's. The first `moved` rows follow the rule; the others are of instantaneous velocity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_velocity
from .path import column
from .rows import Net, Rows, forget_autocast


class Pair(NamedTuple):
    """What is trained towards what.

    u: (B, …) on the tape. u_tgt: (B, …) detached. du_dt: (moved, …) the derivative that the rule took; None: it took
    none, or no row is moved.
    """

    u: Tensor
    u_tgt: Tensor
    du_dt: Tensor | None = None


def flow_map(net: Net, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """X_{t→r}(z) = z − (t − r)·u(z, r, t, y), (B, …), of times t and r (B,)."""
    return z - column((t - r).to(z.dtype), z) * check_velocity("u", net(z, r, t, y), z)


def instantaneous_velocity(b: Rows, a: Tensor) -> Pair:
    """u(z, t, t) towards a (flow matching, arXiv 2210.02747); no row is moved.

    Args:
        a: (B, …) velocity, detached.
    """
    return Pair(b.predict(), a)


def total_derivative(b: Rows, a: Tensor, *, warm_up: Tensor | None = None) -> Pair:
    """u(z, r, t) towards a − (t − r)·du/dt, du/dt along (a, 0, 1) (MeanFlow, arXiv 2505.13447, eq. 10).

    Args:
        a: (B, …) velocity, detached.
        warm_up: (B,) factor of the derivative; default: 1.
    """
    u, du_dt = b.with_derivative(a)  # [B, …], [moved, …]
    u = check_velocity("u", u, b.z)
    return Pair(u, _towards(b, a, du_dt, warm_up), du_dt)


def finite_difference(b: Rows, a: Tensor, *, h: float = 1e-3) -> Pair:
    """`total_derivative` with (u(z + h·a, r, t + h) − u(z − h·a, r, t − h))/2h in the place of the derivative.

    For networks without a forward-mode rule: two forwards more, and an error of h² beside that of rounding over h. At
    the ends of [r, 1] the step is cut to what there is.
    """
    u = b.predict()  # [B, …]
    if b.moved == 0:
        return Pair(u, a)
    n = b.moved
    r, t, y, z, a_ = b.r[:n], b.t[:n], b.y[:n], b.z[:n], a[:n]
    with torch.no_grad():
        before, after = torch.maximum(t - h, r), (t + h).clamp(max=1.0)  # [moved] each
        points = [z + column((s - t).to(z.dtype), z) * a_ for s in (before, after)]  # [moved, …] each
        out = b.net(torch.cat(points), r.repeat(2), torch.cat([before, after]), y.repeat(2))  # [2·moved, …]
        u_before, u_after = out.chunk(2)
        du_dt = (u_after - u_before) / column((after - before).to(z.dtype), z)  # [moved, …]
        forget_autocast(z.device)
    return Pair(u, _towards(b, a, du_dt, None), du_dt)


def composition(
    b: Rows, a: Tensor, s: Tensor, *, second: Net, first: Net | None = None, clip: float | None = None
) -> Pair:
    """u(z, r, t) towards the average velocity of two steps, over [s, t] and then [r, s].

    u_tgt = ((t − s)·a + (s − r)·u⁻(z_s, r, s))/(t − r) with z_s = z − (t − s)·a: consistency training (arXiv
    2303.01469) and α-Flow (arXiv 2510.20771) with a velocity a, Shortcut (arXiv 2410.12557) and SplitMeanFlow (arXiv
    2507.16884) with a = u⁻(z, s, t) of a network. Rows with s = r have the target a alone.

    Args:
        a: (B, …) velocity, detached: the target of the rows that are not moved, and the first step without `first`.
        s: (B,) times between r and t.
        second: u⁻ of the second step, evaluated without gradient; and of the first step: `first`.
        clip: the largest absolute value of z_s and u_tgt, where the first step is a network's; None: any.
    """
    u = b.predict()  # [B, …]
    n = b.moved
    if n == 0:
        return Pair(u, a)
    with torch.no_grad():
        z, r, s, t, y = b.z[:n], b.r[:n], s[:n], b.t[:n], b.y[:n]
        step = a[:n] if first is None else check_velocity("u", first(z, s, t, y), z).to(b.v.dtype)  # [moved, …]
        z_s = z - b.column(t - s) * step  # [moved, …]
        z_s = z_s if clip is None else z_s.clamp(-clip, clip)
        inner = s > r  # [moved]; elsewhere the network is asked at t, where every form is finite
        rest = check_velocity("u", second(z_s, r, torch.where(inner, s, t), y), z).to(b.v.dtype)  # [moved, …]
        forget_autocast(z.device)
        share = torch.where(inner, (t - s) / (t - r), torch.ones_like(t))  # [moved]
        both = b.column(share) * step + b.column(1 - share) * rest  # [moved, …]
        both = torch.where(b.column(inner.to(t.dtype)) > 0, both, step)
        both = both if clip is None else both.clamp(-clip, clip)
        return Pair(u, torch.cat([both, a[n:]]))


def terminal_velocity(b: Rows, end: Net, *, u: Tensor, du_dr: Tensor | None) -> Pair:
    """∂X_{t→r}/∂r = u − (t − r)·∂u/∂r towards the velocity at its end, end(X, r, r) (arXiv 2511.19797, 2505.18825).

    Args:
        end: u⁻ of the target, evaluated without gradient.
        u: (B, …) the prediction, on the tape.
        du_dr: (moved, …) its derivative by r; off the tape: the gradient then is that of u alone.
    """
    n = b.moved
    if n == 0 or du_dr is None:
        return Pair(u, b.v)
    speed = u[:n] - b.gap[:n] * du_dr  # [moved, …]
    with torch.no_grad():
        X = b.z[:n] - b.gap[:n] * u[:n]  # [moved, …]
        target = check_velocity("u", end(X, b.r[:n], b.r[:n], b.y[:n]), X).to(b.v.dtype)  # [moved, …]
        forget_autocast(X.device)
    return Pair(torch.cat([speed, u[n:]]), torch.cat([target, b.v[n:]]), du_dr)


def moment_matching(y: Tensor, other: Tensor, *, group: int, scale: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of groups of samples (arXiv 2503.07565, eq. 12), (B,): its group's for each row.

    The kernel is exp(−scale·max(‖a − b‖, 1e-8)/D); D numbers a sample.

    Args:
        y: (B, …) on the tape; other: (B, …) detached.
        group: consecutive samples that are compared with each other; divides B.
        scale: (B,), equal within a group.
    """
    D = y[0].numel()
    a, b = y.reshape(-1, group, D), other.reshape(-1, group, D)  # [B/M, M, D]
    width = scale.to(y.dtype).reshape(-1, group)[:, :1, None] / D  # [B/M, 1, 1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = (a[:, :, None] - b[:, None, :]).norm(dim=-1)  # [B/M, M, M]; its gradient at 0 is 0
        return torch.exp(-width * distance.clamp_min(1e-8))

    total = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)  # [B/M, M, M]
    return total.mean(dim=(1, 2)).repeat_interleave(group)  # [B]


@torch.no_grad()
def _towards(b: Rows, a: Tensor, du_dt: Tensor | None, warm_up: Tensor | None) -> Tensor:
    """a − (t − r)·du/dt where there is a derivative, a elsewhere, (B, …)."""
    if du_dt is None:
        return a
    n = b.moved
    step = b.gap[:n] if warm_up is None else b.gap[:n] * b.column(warm_up[:n])  # [moved, 1, …]
    return torch.cat([a[:n] - step * du_dt.to(a.dtype), a[n:]])
