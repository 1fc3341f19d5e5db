"""A batch in training, the rows with r ≠ t first: what an objective's formulas are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfkernels import jvp
from mfkernels.checks import autocast_enabled

from ..checks import check_velocity, no_label_of
from .path import LinearPath, column

# u = net(z, r, t, y)
Net = Callable[..., Any]


@dataclass(frozen=True)
class Rows:
    """Points on the path and their conditions; the first `moved` rows have r ≠ t, and only those carry tangents.

    net: u(z, r, t, y), the network in its form.
    x, noise: (B, …) data and noise; path: between them.
    z: (B, …) points at times t; v: (B, …) the path's velocity there, given data and noise.
    r, t: (B,) times.
    labels: (B,) as they are in the data; y: (B,) as the network is given them in training; drop: (B,) bool, True where
        that is "no label"; None: nowhere.
    conditions: further draws by name, (B,) or (B, …).
    phase: see `Draws.phase`.
    """

    net: Net
    path: LinearPath
    x: Tensor
    noise: Tensor
    z: Tensor
    v: Tensor
    r: Tensor
    t: Tensor
    labels: Tensor
    y: Tensor
    drop: Tensor | None
    moved: int
    conditions: Mapping[str, Tensor]
    phase: str = ""

    @property
    def no_label(self) -> int:
        """The label that means "no label".

        Raises:
            NetworkError: the network has no attribute `num_classes`.
        """
        return no_label_of(self.net)

    def column(self, a: Tensor) -> Tensor:
        """(B,) numbers of the rows, to be multiplied with velocities: (B, 1, …) of their dtype."""
        return column(a.to(self.v.dtype), self.v)

    @property
    def gap(self) -> Tensor:
        """t − r, (B, 1, …), to be multiplied with velocities."""
        wide = torch.promote_types(self.t.dtype, torch.float32)  # a difference of half-precision times needs more bits
        return self.column(self.t.to(wide) - self.r.to(wide))

    def at(self, t: Tensor, r: Tensor | None = None, *, noise: Tensor | None = None) -> Rows:
        """The same data and labels at times t (B,) and r (default: t), with this noise (B, …) or the same."""
        e = self.noise if noise is None else noise
        z, v = self.path.point(self.x, e, t), self.path.velocity(self.x, e, t)  # [B, …] each
        moved = 0 if r is None else self.moved
        return dataclasses.replace(self, noise=e, z=z, v=v, t=t, r=t if r is None else r, moved=moved)

    def still(self, n: int) -> Rows:
        """The first n rows, none of them moved: the same points, data and labels with r = t."""
        names = ("x", "noise", "z", "v", "t", "labels", "y")
        first: dict[str, Any] = {name: getattr(self, name)[:n] for name in names}
        drop = None if self.drop is None else self.drop[:n]
        cut = {name: a[:n] for name, a in self.conditions.items()}
        return dataclasses.replace(self, **first, r=first["t"], drop=drop, moved=0, conditions=cut)

    def joined(self, others: Rows) -> Rows:
        """These rows, and then others of which none is moved, as one batch for the network, without draws by name."""
        names = ("x", "noise", "z", "v", "r", "t", "labels", "y")
        both: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(others, name)]) for name in names}
        drop = None if self.drop is None or others.drop is None else torch.cat([self.drop, others.drop])  # [B + B']
        return dataclasses.replace(self, **both, drop=drop, conditions={})

    def with_intervals(self, others: Sequence[Tensor]) -> Rows:
        """The moved rows once for their own r and once for each of `others` (B,), then the rows that are not moved."""
        n, times = self.moved, 1 + len(others)

        def repeated(a: Tensor) -> Tensor:
            return torch.cat([*[a[:n]] * times, a[n:]])

        names = ("x", "noise", "z", "v", "t", "labels", "y")
        rows: dict[str, Any] = {name: repeated(getattr(self, name)) for name in names}
        rows["r"] = torch.cat([self.r[:n], *(r[:n] for r in others), self.r[n:]])  # [times·moved + rest]
        rows["drop"] = None if self.drop is None else repeated(self.drop)
        rows["conditions"] = {name: repeated(a) for name, a in self.conditions.items()}
        return dataclasses.replace(self, **rows, moved=times * n)

    def padded(self, derivative: Tensor | None) -> Tensor:
        """A derivative of the first rows, (moved, …), as one of all, (B, …): zero where no row is moved."""
        still = self.z.new_zeros(len(self.z) - self.moved, *self.z.shape[1:])
        return still if derivative is None else torch.cat([derivative.to(still.dtype), still])

    def predict(self, **conditions: Any) -> Tensor:
        """u(z, r, t, y) of every row, (B, …), on the tape."""
        return check_velocity("u", self.net(self.z, self.r, self.t, self.y, **conditions), self.z)

    def with_derivative(
        self,
        velocity: Tensor | None,
        *,
        dr: float = 0.0,
        dt: float = 1.0,
        differentiable: bool = False,
        **conditions: Any,
    ) -> tuple[Any, Any]:
        """net(z, r, t, y) of every row, and du/dt of the first ones: its derivative along (velocity, dr, dt).

        Args:
            velocity: (moved, …), or of more rows; None: z stays.
            dr, dt: what the times change by.
            differentiable: the derivative is on the tape too, by `torch.func.jvp` of the network on those rows: for
                networks of plain PyTorch. A gradient through the tangent of this library's layers is an error.

        Returns:
            What the network returns, on the tape, and its derivative with `moved` rows; None where there are none.
        """
        if self.moved == 0:
            return self.net(self.z, self.r, self.t, self.y, **conditions), None
        r, t = self.r[: self.moved], self.t[: self.moved]  # [moved]
        dz = None if velocity is None else velocity[: self.moved]  # [moved, …]
        tangents = (dz, torch.full_like(r, dr), torch.full_like(t, dt))
        if differentiable:
            z, y, cut = self.z[: self.moved], self.y[: self.moved], {k: a[: self.moved] for k, a in conditions.items()}
            along = (torch.zeros_like(z) if dz is None else dz, *tangents[1:])
            out = self.net(self.z, self.r, self.t, self.y, **conditions)
            return out, torch.func.jvp(lambda z, r, t: self.net(z, r, t, y, **cut), (z, r, t), along)[1]
        return jvp(self.net, (self.z, self.r, self.t), tangents, y=self.y, **conditions)


def forget_autocast(device: torch.device) -> None:
    """After a forward under no_grad: autocast would hand the weights it cast there to the training pass, and those
    have no gradient."""
    if autocast_enabled(device) and not torch.compiler.is_compiling():  # a compiled graph has no such cache
        torch.clear_autocast_cache()
