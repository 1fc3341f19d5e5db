"""Where the velocity of a target comes from: data and noise, guided by the network itself, or a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_velocity
from ..errors import UsageError
from ..options import Options, choice, option
from ..registry import register
from .rows import Net, Rows, forget_autocast

_LEAST = 1e-4  # times are taken for no less where the posterior of the data is computed


@dataclass(frozen=True)
class TargetVelocity(Options, ABC):
    """The velocity at (z, t) that an objective's targets start from, in the place of `Rows.v`, as a group of options.

    teachers: which pretrained networks it evaluates, as `Objective.teachers`.
    """

    teachers: ClassVar[tuple[str, ...]] = ()

    @property
    def group_size(self) -> int:
        """Consecutive samples that belong together, as `Objective.group_size`."""
        return 1

    @abstractmethod
    def of(self, b: Rows, order: Tensor, frozen: Net | None) -> Tensor:
        """(B, …), detached.

        Args:
            b: the batch, with the velocity of each sample's own data and noise.
            order: (B,) the place of each of its rows in the batch as it was given.
            frozen: the teacher, u(z, r, t, y), where there is one.
        """


@register("velocities", "data")
@dataclass(frozen=True)
class DataVelocity(TargetVelocity):
    """That of each sample's data and noise, e − x."""

    def of(self, b: Rows, order: Tensor, frozen: Net | None) -> Tensor:
        """The path's velocity."""
        return b.v


@register("velocities", "teacher")
@dataclass(frozen=True)
class TeacherVelocity(TargetVelocity):
    """That of a pretrained flow, with classifier-free guidance: u_∅ + guidance·(u_y − u_∅) at r = t (arXiv 2207.12598).

    It is the mean of e − x over all data that lead to z, so a target has no noise of the data in it. A sample that is
    trained without its label has the velocity without label.

    Args:
        guidance: scale of classifier-free guidance in the teacher; 1 is none
        t_min: guided times, from
        t_max: guided times, to
    """

    teachers: ClassVar[tuple[str, ...]] = ("frozen",)

    guidance: float = 1.0
    t_min: float = option(0.0, low=0.0, high=1.0)
    t_max: float = option(1.0, low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min > self.t_max:
            raise UsageError(f"expected at most t_max = {self.t_max}, got {self.t_min}", field="t_min")

    def of(self, b: Rows, order: Tensor, frozen: Net | None) -> Tensor:
        """The teacher's."""
        assert frozen is not None
        scale: Any = self.guidance
        if scale != 1.0 and (self.t_min, self.t_max) != (0.0, 1.0):
            inside = (b.t >= self.t_min) & (b.t <= self.t_max)  # [B]
            scale = b.column(torch.where(inside, scale, 1.0))  # [B, 1, …]
        no_label = b.no_label if self.guidance != 1.0 else -1
        return guided(frozen, b.z, b.t, b.t, b.y, scale=scale, no_label=no_label).to(b.v.dtype)


@register("velocities", "neighbours")
@dataclass(frozen=True)
class AveragedVelocity(TargetVelocity):
    """The mean of (z − x_j)/t over the data x_j of a group of samples, each as probable as it is to have led to z.

    The weights are the posterior's, exp(−‖(z − (1 − t)·x_j)/t‖²/2), over the samples of the same label (over all where
    the label is dropped): the stable target field (arXiv 2302.00670). A derivative is linear in its direction, so one
    along this mean is the mean of the derivatives along the velocities of all these pairs of data and noise.

    Args:
        group: consecutive samples of a batch among which neighbours are looked for; divides the batch
        count: the most probable ones, of which the mean is taken (of more where they are equally so); 0: all
    """

    group: int = option(32, low=2)
    count: int = option(0, low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count > self.group:
            raise UsageError(f"expected at most group = {self.group}, got {self.count}", field="count")

    @property
    def group_size(self) -> int:
        """The group."""
        return self.group

    @torch.no_grad()
    def of(self, b: Rows, order: Tensor, frozen: Net | None) -> Tensor:
        """v + (x − Σ_j w_j·x_j)/t, which is that mean without the cancellation at small t."""
        B = len(b.x)
        if B % self.group:
            raise ValueError(f"x: expected a multiple of group = {self.group} samples, got {B}")
        # differences of squares, which are divided by times near 0; autocast and TF32 leave double precision alone
        place, wide = order // self.group, torch.float64
        x, e = b.x.flatten(1).to(wide), b.noise.flatten(1).to(wide)  # [B, D] each
        t = b.t.to(wide)[:, None]  # [B, 1]
        scale = (t + b.path.floor * (1 - t)).clamp_min(_LEAST)  # [B, 1], of the noise
        # ‖e_i + (1 − t)/scale·(x_i − x_j)‖² without a tensor of (B, B, D)
        slope = (1 - t) / scale  # [B, 1]
        point = e + slope * x  # [B, D]
        square = x.square().sum(dim=1)  # [B]
        log_w = slope * (point @ x.mT) - 0.5 * slope.square() * square  # [B, B], up to a constant of each row
        alike = b.labels[:, None] == b.labels  # [B, B]
        alike = alike if b.drop is None else alike | b.drop[:, None]
        log_w = log_w.masked_fill(~(alike & (place[:, None] == place)), -torch.inf)
        if self.count:
            least = log_w.topk(self.count, dim=1).values[:, -1:]  # [B, 1]
            log_w = log_w.masked_fill(log_w < least, -torch.inf)
        w = log_w.softmax(dim=1)  # [B, B]
        away = (x - w @ x) / scale  # [B, D]
        return b.v + away.view_as(b.x).to(b.v.dtype)


def velocity_option(default: Callable[[], TargetVelocity] = DataVelocity) -> Any:
    """A field that holds a target velocity, chosen by `--velocity`, for an objective."""
    return choice("velocities", default, prefix="velocity_", methods=("of",))


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
