"""Where the velocity of a target comes from: data and noise, guided by the network itself, or a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_velocity
from .rows import Net, Rows, forget_autocast


def mixed(omega: float, kappa: float) -> dict[str, float]:
    """Weights of `guided_velocity` for MeanFlow's ω and κ (arXiv 2505.13447, eq. 19)."""
    return {"data": omega, "label": kappa, "null": 0.0 if omega + kappa == 1.0 else 1.0 - omega - kappa}


@torch.no_grad()
def guided_velocity(b: Rows, active: Tensor, *, data: float, label: float, null: float) -> tuple[Tensor, Tensor]:
    """data·v + label·u(z,t,t|y) + null·u(z,t,t|∅) where `active`, else v; and the weight of u(z,t,t|y) that rows lack.

    One forward of the network: all rows without label, and those that are moved with theirs. Where a row is not moved,
    the training prediction is its u(z,t,t|y): see `with_own`.

    Args:
        active: (B,) bool, the rows that are guided.

    Returns:
        (B, …) and (B, 1, …), the weight `label` of active rows.
    """
    on = b.column(active)  # [B, 1, …]
    w_label, w_null = on * label, on * null
    v_g = (1.0 + on * (data - 1.0)) * b.v  # [B, …]
    n_null = 0 if null == 0 else len(b.z)
    n_label = 0 if label == 0 else b.moved
    if n_null + n_label > 0:
        none = torch.full_like(b.y, b.no_label)  # [B]
        z, t = torch.cat([b.z[:n_null], b.z[:n_label]]), torch.cat([b.t[:n_null], b.t[:n_label]])
        u = b.net(z, t, t, torch.cat([none[:n_null], b.y[:n_label]]))
        u = check_velocity("u", u, z).to(b.v.dtype)  # [n_null + n_label, …]
        forget_autocast(b.z.device)
        if n_null:
            v_g = v_g + w_null * u[:n_null]
        if n_label:
            v_g = torch.cat([v_g[: b.moved] + w_label[: b.moved] * u[n_null:], v_g[b.moved :]])
    return v_g, w_label


def with_own(b: Rows, v_g: Tensor, w_label: Tensor, u: Tensor) -> Tensor:
    """`guided_velocity` with what its rows that are not moved lacked: the prediction u (B, …) itself, detached."""
    return torch.cat([v_g[: b.moved], (v_g + w_label * u.detach())[b.moved :]]).to(b.v.dtype)


@torch.no_grad()
def guided(
    net: Net, z: Tensor, r: Tensor, t: Tensor, y: Tensor, *, scale: float | Tensor, no_label: int = -1
) -> Tensor:
    """u_∅ + scale·(u_y − u_∅) with u(z, r, t, ·) of a network, (B, …), both in one batch; with 1 u_y alone.

    Args:
        scale: a number, or (B, 1, …).
    """
    if isinstance(scale, float | int) and scale == 1:
        u = check_velocity("u", net(z, r, t, y), z)
    else:
        labels = torch.cat([torch.full_like(y, no_label), y])  # [2·B]
        both = net(torch.cat([z, z]), r.repeat(2), t.repeat(2), labels)  # [2·B, …]
        without, with_label = check_velocity("u", both, torch.cat([z, z])).chunk(2)
        u = without + scale * (with_label - without)
    forget_autocast(z.device)
    return u


@torch.no_grad()
def heun_step(net: Net, z: Tensor, y: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z at s from z at t > s by one step of Heun's method for dx/dσ = (x − x̂)/σ, with σ = t/(1 − t).

    Source: arXiv 2206.00364, algorithm 1.

    Args:
        net: u(z, t, t, y), whose denoised image is x̂ = z − t·u.
        z: (B, …); t, s: (B,) times in (0, 1).
    """

    def slope(z: Tensor, t: Tensor) -> Tensor:
        t_ = t.to(z.dtype).view(-1, *[1] * (z.ndim - 1))  # [B, 1, …]
        u = check_velocity("u", net(z, t, t, y), z).to(z.dtype)
        return (z / (1 - t_) - (z - t_ * u)) * ((1 - t_) / t_)  # [B, …]

    t_, s_ = (a.to(z.dtype).view(-1, *[1] * (z.ndim - 1)) for a in (t, s))  # [B, 1, …]
    h = s_ / (1 - s_) - t_ / (1 - t_)  # of σ
    x, first = z / (1 - t_), slope(z, t)  # [B, …] each
    euler = x + h * first  # [B, …]
    x = x + h / 2 * (first + slope(euler * (1 - s_), s))
    forget_autocast(z.device)
    return x * (1 - s_)
