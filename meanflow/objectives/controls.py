"""Penalties on the network's Jacobian ∂u/∂z, and the bridge: options that several objectives have beside their papers'.

Both are read from one random direction ε at each probed row, Jε = (∂u/∂z)·ε at (z, r, t), ε ~ N(0, I):

    Lipschitz    E‖Jε‖² = ‖J‖_F², so ‖Jε‖²/D estimates the mean squared singular value of J
    monotone     the flow map X(z) = z − (t − r)·u(z, r, t) is monotone, ⟨z − z', X(z) − X(z')⟩ >= 0, where
                 εᵀ(ε − (t − r)·Jε) >= 0 for every ε: then no step of it turns two points around along the line
                 between them, as no optimal transport does
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mfkernels import jvp

from ..checks import check_finite, check_velocity
from ..errors import NetworkError, UsageError
from ..options import Options, option
from ..registry import name_of
from .objective import Objective, Terms
from .path import BridgePath
from .rows import Net, Rows, forget_autocast
from .velocities import DataVelocity

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Control(Options):
    """Penalties on ∂u/∂z: lipschitz·‖Jε‖²/D + monotone·max(0, margin − εᵀ(ε − (t − r)·Jε)/‖ε‖²)² of each probed row.

    Probed are the rows with r ≠ t; where there are none, all. The mean of their penalties is added to the loss.

    Values are exact: Jε is the forward-mode derivative. It has no gradient in this library, so the penalties' gradient
    is taken through the central difference (u(z + hε, r, t) − u(z − hε, r, t))/2h in its place, with h = `step`: an
    error of h² beside that of rounding over h. Relative to the exact gradient it was 8e-5 with the default, in float64
    and float32, for a small perceptron, and 8e-3 for a transformer with large random weights; under autocast to
    bfloat16 0.11, and 0.014 with a step of 0.1. A probed row costs a derivative, three forwards and two backwards.

    Args:
        lipschitz: weight of the penalty on ‖∂u/∂z‖²; 0 is none
        monotone: weight of the penalty on flow maps that are not monotone; 0 is none
        margin: least εᵀ(∂X/∂z)ε/‖ε‖² of the flow map X that is not penalised; 0 is monotone, 1 moves nothing closer
        every: probe one of so many of these rows; then a batch that is cut into parts may have other rows probed
        step: h of the central difference, in standard deviations of the noise; take 0.1 in bfloat16
    """

    metrics: ClassVar[tuple[str, ...]] = ("lipschitz", "monotone_violations")

    lipschitz: float = option(0.0, low=0.0)
    monotone: float = option(0.0, low=0.0)
    margin: float = option(0.0, high=1.0)
    every: int = option(1, low=1)
    step: float = option(0.01, low=0.0, above=True, high=1.0)

    @property
    def on(self) -> bool:
        """Whether anything is penalised."""
        return self.lipschitz > 0 or self.monotone > 0

    def penalty(self, b: Rows, probe: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty of each row, (B,), whose mean is that of the probed ones; and the same of the `metrics`.

        Rows that are not probed have zero, and the others a factor for that.

        Args:
            probe: (B, …) directions ε.

        Raises:
            ValueError: they have another shape.
        """
        if probe.shape != b.z.shape:
            raise ValueError(f"probe: expected the shape of x, {tuple(b.z.shape)}, got {tuple(probe.shape)}")
        rows = slice(0, b.moved or len(b.z), self.every)
        z, r, t, y, ε = b.z[rows], b.r[rows], b.t[rows], b.y[rows], probe[rows].to(b.z.dtype)  # n rows each
        with torch.no_grad():
            u, Jε = jvp(b.net, (z, r, t), (ε, torch.zeros_like(r), torch.zeros_like(t)), y=y)
            check_velocity("u", u, z)
            forget_autocast(z.device)
            wide = torch.promote_types(Jε.dtype, torch.float32)
            Jε, e, gap = Jε.to(wide).flatten(1), ε.to(wide).flatten(1), b.gap[rows].to(wide).flatten()  # [n, D], [n]
            D, share = e.shape[1], gap / e.square().sum(dim=1)  # [n]
            size = Jε.square().sum(dim=1) / D  # [n]
            form = 1 - share * (e * Jε).sum(dim=1)  # [n], εᵀ(∂X/∂z)ε/‖ε‖²
            lack = (self.margin - form).clamp_min(0)  # [n]
            value = self.lipschitz * size + self.monotone * lack.square()  # [n]
            # the derivative of the value by Jε
            slope = (2 * self.lipschitz / D) * Jε + (2 * self.monotone) * (lack * share)[:, None] * e  # [n, D]
        h = self.step
        both = b.net(torch.cat([z + h * ε, z - h * ε]), r.repeat(2), t.repeat(2), y.repeat(2))  # [2·n, …]
        after, before = check_velocity("u", both, torch.cat([z, z])).to(wide).flatten(1).chunk(2)  # [n, D] each
        moved = (slope * (after - before)).sum(dim=1) / (2 * h)  # [n], of which only the gradient is used
        found = {"lipschitz": size, "monotone_violations": (form < 0).to(wide)}
        spread = {name: self._of_all(a, rows, b) for name, a in found.items()}
        return self._of_all(value + (moved - moved.detach()), rows, b), spread

    def _of_all(self, a: Tensor, rows: slice, b: Rows) -> Tensor:
        """(n,) numbers of the probed rows as (B,) ones of the same mean."""
        B = len(b.z)
        index = torch.arange(B, device=a.device)[rows]  # [n]
        return a.new_zeros(B).index_copy(0, index, a * (B / len(a)))


@dataclass(frozen=True)
class Controlled(Objective, ABC):
    """An objective with fields `control`, or also `bridge` and `bridge_end`: they change its draws, path and loss."""

    if TYPE_CHECKING:  # of every subclass; a dataclass would take them for fields of this one

        @property
        def control(self) -> Control: ...
        @property
        def bridge(self) -> float: ...
        @property
        def bridge_end(self) -> float: ...

    else:
        bridge = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.control, Control):
            raise TypeError(f"control: expected a Control, such as Control(lipschitz=0.1), got {self.control!r}")
        if self.control.monotone > 0 and self.ratio == 0:
            raise UsageError(
                "expected 0 where no sample has r != t: then no flow map is trained", field="control_monotone"
            )
        more: tuple[str, ...] = ()
        if self.control.on:
            more += ("probe",)
            object.__setattr__(self, "metrics", (*type(self).metrics, *Control.metrics))
        if self.bridge > 0:
            if type(self.velocity) is not DataVelocity:
                name = name_of("velocities", type(self.velocity))
                expected = "expected data with bridge > 0, whose path has other velocities"
                raise UsageError(f"{expected}; got {name}", field="velocity")
            more += ("bridge_noise",)
            object.__setattr__(self, "path", BridgePath(sigma=self.bridge, end=self.bridge_end))
        object.__setattr__(self, "conditions", (*type(self).conditions, *more))

    def draw_noises(self, noise: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The directions of the probe and the noise of the bridge, where they are used."""
        like: dict[str, Any] = {"generator": generator, "device": noise.device, "dtype": noise.dtype}
        names = [name for name in ("probe", "bridge_noise") if name in self.conditions]
        return {name: torch.randn(noise.shape, **like) for name in names}

    def check_network(self, net: Net) -> None:
        """Raise a NetworkError unless `net` takes what the objective gives it, twice with one result."""
        super().check_network(net)
        if not self.control.on:
            return
        for name, part in net.named_modules() if isinstance(net, nn.Module) else ():
            if isinstance(part, _DROPOUT) and part.training and part.p > 0:
                raise NetworkError(
                    f"net: expected a network without dropout, whose differences control takes, got {name}, {part}"
                )

    def check_conditions(self, conditions: Mapping[str, Tensor]) -> None:
        """Raise unless the draws of `draw_noises` are finite."""
        super().check_conditions(conditions)
        for name, a in conditions.items():
            check_finite(name, a)

    def penalised(self, terms: Terms, b: Rows) -> Terms:
        """With the penalties of `control`."""
        if not self.control.on:
            return terms
        penalty, metrics = self.control.penalty(b, b.conditions["probe"])  # [B]
        per_sample = terms.per_sample + penalty.to(terms.per_sample.dtype)  # [B]
        return terms._replace(per_sample=per_sample, metrics={**terms.metrics, **metrics})
