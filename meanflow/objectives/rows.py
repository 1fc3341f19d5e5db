"""A batch in training, the rows with r ≠ t first: what an objective's formulas are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfkernels import jvp
from mfkernels.checks import autocast_enabled

from ..checks import no_label_of
from .path import column

# u = net(z, r, t, y)
Net = Callable[..., Any]


@dataclass(frozen=True)
class Rows:
    """Points on the path and their conditions; the first `moved` rows have r ≠ t, and only those carry tangents.

    z: (B, …) points at times t; v: (B, …) the path's velocity there, given data and noise.
    r, t: (B,) times.
    labels: (B,) as they are in the data; y: (B,) as the network is given them in training; drop: (B,) bool, True where
        that is "no label"; None: nowhere.
    conditions: further (B,) draws by name.
    """

    net: Net
    z: Tensor
    v: Tensor
    r: Tensor
    t: Tensor
    labels: Tensor
    y: Tensor
    drop: Tensor | None
    moved: int
    conditions: Mapping[str, Tensor]

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

    def with_derivative(self, velocity: Tensor, **conditions: Any) -> tuple[Any, Any]:
        """net(z, r, t, y) of every row, and du/dt of the first ones: its derivative along (velocity, 0, 1).

        Args:
            velocity: (moved, …), or of more rows.

        Returns:
            What the network returns, on the tape, and its derivative with `moved` rows; None where there are none.
        """
        if self.moved == 0:
            return self.net(self.z, self.r, self.t, self.y, **conditions), None
        r, t = self.r[: self.moved], self.t[: self.moved]  # [moved]
        tangents = (velocity[: self.moved], torch.zeros_like(r), torch.ones_like(t))
        return jvp(self.net, (self.z, self.r, self.t), tangents, y=self.y, **conditions)


def forget_autocast(device: torch.device) -> None:
    """After a forward under no_grad: autocast would hand the weights it cast there to the training pass, and those
    have no gradient."""
    if autocast_enabled(device) and not torch.compiler.is_compiling():  # a compiled graph has no such cache
        torch.clear_autocast_cache()
