"""MeanFlow (arXiv 2505.13447) and flow matching (arXiv 2210.02747), in the papers' letters.

z_t = (1 − t) x + t e,  v = e − x,  u_tgt = v − (t − r)·du/dt,  du/dt = (∂u/∂z)·v + ∂u/∂t.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfkernels import adaptive_squared_error, jvp
from mfkernels.checks import autocast_enabled, check_number

from ..checks import check_finite, check_takes, check_velocity, num_classes_of
from .draws import Draws
from .objective import Net, Objective, ObjectiveOutput, check_draws, check_shares_and_norm, check_times
from .time_samplers import LogitNormal, TimeSampler


@dataclass(frozen=True)
class MeanFlow(Objective[ObjectiveOutput]):
    """The MeanFlow objective (arXiv 2505.13447, Algorithm 1, with guidance in the target, eqs. 19-21).

    Args:
        ratio: share of samples with r ≠ t, in [0, 1]; their number is round(B·ratio), the same for every batch.
        omega: weight ω of the conditional velocity in the guided target v_g = ω·v + κ·u(z,t,t|y) + (1−ω−κ)·u(z,t,t|∅).
        kappa: weight κ of the network's own class-conditional velocity; the effective scale is ω/(1−κ).
        guidance_interval: closed interval of t in which the target is guided; outside it v_g = v.
        label_dropout: probability that a sample is trained without its label, in [0, 1]; such a row is not guided.
        norm_p: power p of the adaptive weight 1/(‖Δ‖² + norm_eps)^p (eq. 22); 0 is plain squared error.
        norm_eps: ε in it.
        time_sampler: how the two times are drawn; the larger is t.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    ratio: float = 0.25
    omega: float = 1.0
    kappa: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    label_dropout: float = 0.1
    norm_p: float = 1.0
    norm_eps: float = 0.01
    time_sampler: TimeSampler = field(default_factory=LogitNormal)

    def __post_init__(self) -> None:
        check_shares_and_norm(self)
        if not isinstance(self.guidance_interval, Iterable):
            raise TypeError(f"guidance_interval: expected a pair (low, high), got {self.guidance_interval!r}")
        interval = tuple(self.guidance_interval)
        if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1] <= 1.0:
            raise ValueError(f"guidance_interval: expected 0 <= low <= high <= 1, got {self.guidance_interval}")
        for name in ("omega", "kappa"):
            check_number(name, getattr(self, name))
        if self.kappa >= 1.0 and self.omega != 0.0:
            raise ValueError(f"kappa: expected less than 1 (the effective scale is ω/(1−κ)), got {self.kappa}")

    @property
    def guided(self) -> bool:
        """Whether the target differs from the plain velocity anywhere."""
        return self.omega != 1.0 or self.kappa != 0.0

    def loss_of(self, net: Net, x: Tensor, y: Tensor, draws: Draws) -> ObjectiveOutput:
        """The loss at what `draw` gave; nothing random, no read on the host: this is what a compiler takes whole."""
        check_draws(net, x, y, draws.noise, t=draws.t, r=draws.r, drop=draws.drop)
        return self._loss(net, x, draws.noise, draws.t, draws.r, y, draws.drop, draws.order, draws.rows)

    def loss_at(
        self,
        net: Net,
        *,
        x: Tensor,
        noise: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        drop: Tensor | None = None,
    ) -> ObjectiveOutput:
        """The loss at given draws; nothing random inside.

        Args:
            net: u = net(z, r, t, y), of the shape of z; the labels are given by the name y.
            x: (B, C, H, W) data.
            noise: (B, C, H, W) noise e.
            t, r: (B,) times in [0, 1], r <= t. Their number of rows with r ≠ t is read on the host.
            y: (B,) integer labels.
            drop: (B,) bool, True where the label is dropped; default: nowhere.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_draws(net, x, y, noise, t=t, r=r, drop=drop)
        check_times(t, r)
        check_finite("noise", noise)
        return self._loss(net, x, noise, t, r, y, drop, *rows_first(t, r))

    def _loss(
        self,
        net: Net,
        x: Tensor,
        e: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        drop: Tensor | None,
        order: Tensor,
        rows: int,
    ) -> ObjectiveOutput:
        """`order` puts the `rows` samples with r ≠ t first; only those carry tangents."""
        back = order.argsort()
        x, e, t, r, y = (a[order] for a in (x, e, t, r, y))
        t_ = column(t.to(x.dtype), x)  # [B, 1, 1, 1]
        z = (1 - t_) * x + t_ * e  # [B, C, H, W]
        v = e - x  # [B, C, H, W]
        y_in, drop = (y, None) if drop is None else (y.masked_fill(drop[order], net_num_classes(net)), drop[order])
        if rows > 0:
            check_takes(net, "y")
        v_g, w_cond = self._guided_velocity(net, z, v, t, y, drop, rows)

        if rows > 0:
            tangents = (v_g[:rows], torch.zeros_like(r[:rows]), torch.ones_like(t[:rows]))
            u, du_dt = jvp(net, (z, r, t), tangents, y=y_in)  # [B, C, H, W], [rows, C, H, W]
        else:
            u, du_dt = net(z, r, t, y_in), torch.zeros_like(z[:0])
        u = check_velocity("u", u, z)
        # where r = t and the label is kept, the prediction itself is the u(z,t,t|y) of the guided target (design §5)
        v_g = torch.cat([v_g[:rows], (v_g + w_cond * u.detach())[rows:]]) if self.kappa != 0 else v_g
        v_g = v_g.to(x.dtype)

        wide = torch.promote_types(t.dtype, torch.float32)  # a difference of half-precision times needs more bits
        interval = t.to(wide) - r.to(wide)  # [B]
        loss = adaptive_squared_error(u, v_g, du_dt.to(u.dtype), interval, p=self.norm_p, eps=self.norm_eps)
        full_du_dt = torch.cat([du_dt, du_dt.new_zeros(u.shape[0] - rows, *u.shape[1:])])
        return ObjectiveOutput(
            loss=loss.per_sample.mean(),
            per_sample=loss.per_sample.detach()[back],
            squared_error=loss.squared_error[back],
            u=u.detach()[back],
            du_dt=full_du_dt[back],
            v=v_g[back],
            t=t[back],
            r=r[back],
        )

    @torch.no_grad()
    def _guided_velocity(
        self, net: Net, z: Tensor, v: Tensor, t: Tensor, y: Tensor, drop: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        """The guided velocity, and the weight of u(z,t,t|y) that rows `rows`… still lack; both broadcast over (B, …).

        One forward of the network: all rows without label, and the first `rows` with theirs.
        """
        if not self.guided:
            return v, v.new_zeros(())
        low, high = self.guidance_interval
        inside = (t >= low) & (t <= high)  # [B]
        active = column((inside if drop is None else inside & ~drop).to(v.dtype), z)  # [B, 1, 1, 1]
        w_cond, w_null = active * self.kappa, active * (1.0 - self.omega - self.kappa)
        v_g = (1.0 + active * (self.omega - 1.0)) * v  # [B, C, H, W]
        B = z.shape[0]
        n_null = 0 if self.omega + self.kappa == 1.0 else B
        n_cond = 0 if self.kappa == 0 else rows
        if n_null + n_cond > 0:
            null = torch.full_like(y, net_num_classes(net))
            z2, t2 = torch.cat([z[:n_null], z[:n_cond]]), torch.cat([t[:n_null], t[:n_cond]])
            u = check_velocity("u", net(z2, t2, t2, torch.cat([null[:n_null], y[:n_cond]])), z2).to(v.dtype)
            forget_autocast(z.device)
            if n_null:
                v_g = v_g + w_null * u[:n_null]
            if n_cond:
                v_g = torch.cat([v_g[:rows] + w_cond[:rows] * u[n_null:], v_g[rows:]])
        return v_g, w_cond


@dataclass(frozen=True)
class FlowMatching(Objective[ObjectiveOutput]):
    """Flow matching: u(z, t, t, y) is trained towards v = e − x (arXiv 2210.02747); MeanFlow with r = t everywhere.

    Args:
        label_dropout: probability that a sample is trained without its label, in [0, 1].
        norm_p: power of the adaptive weight; 0 is plain squared error (summed over pixels).
        norm_eps: ε in it.
        time_sampler: how t is drawn.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    ratio = 0.0  # no field: r = t by definition
    label_dropout: float = 0.1
    norm_p: float = 0.0
    norm_eps: float = 0.01
    time_sampler: TimeSampler = field(default_factory=lambda: LogitNormal(0.0, 1.0))

    def __post_init__(self) -> None:
        # made once, here: torch.compile does not take an objective that is made within the region
        meanflow = MeanFlow(
            ratio=0.0,
            omega=1.0,
            kappa=0.0,
            label_dropout=self.label_dropout,
            norm_p=self.norm_p,
            norm_eps=self.norm_eps,
            time_sampler=self.time_sampler,
        )
        object.__setattr__(self, "_meanflow", meanflow)

    def _as_meanflow(self) -> MeanFlow:
        meanflow: MeanFlow = self.__dict__["_meanflow"]
        return meanflow

    def _draw_times(
        self, n: int, generator: torch.Generator | None, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        t = self.time_sampler.sample(n, generator=generator, device=device)  # [B]
        return t, t

    def loss_of(self, net: Net, x: Tensor, y: Tensor, draws: Draws) -> ObjectiveOutput:
        """The loss at what `draw` gave."""
        return self._as_meanflow().loss_of(net, x, y, draws)

    def loss_at(
        self, net: Net, *, x: Tensor, noise: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None
    ) -> ObjectiveOutput:
        """The loss at given draws; arguments as `MeanFlow.loss_at`, r = t."""
        return self._as_meanflow().loss_at(net, x=x, noise=noise, t=t, r=t, y=y, drop=drop)


def column(a: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …) of the rank of `like`."""
    return a.view(-1, *[1] * (like.ndim - 1))


def rows_first(t: Tensor, r: Tensor) -> tuple[Tensor, int]:
    """The order (B,) that puts the rows with r ≠ t first, and their number, which is read on the host."""
    same = r == t  # [B]
    return torch.argsort(same.to(torch.uint8), stable=True), int((~same).sum())


def forget_autocast(device: torch.device) -> None:
    """After a forward under no_grad: autocast would hand the weights it cast there to the training pass, and those
    have no gradient."""
    if autocast_enabled(device) and not torch.compiler.is_compiling():  # a compiled graph has no such cache
        torch.clear_autocast_cache()


def net_num_classes(net: Net) -> int:
    """The index that means "no label" for `net`; looks inside wrappers such as DDP.

    Raises:
        TypeError: neither `net` nor a module it wraps has the attribute `num_classes`.
    """
    n = num_classes_of(net)
    if n is not None:
        return n
    raise TypeError(
        'net: expected an attribute num_classes (the index that means "no label") because labels are dropped or the '
        f"target is guided; {type(net).__name__} has none. Set it, or use label_dropout=0, omega=1, kappa=0"
    )
