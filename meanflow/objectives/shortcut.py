"""Shortcut models (arXiv 2410.12557): steps of 2^−k, each trained towards two of half its size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..options import choice, option
from ..registry import register
from ..sampling import FewSteps, Sampling, sampler_option
from .draws import Draws
from .forms import AverageVelocity, Form, Shortcut
from .objective import Networks, Objective, Terms
from .path import LinearPath
from .rows import Rows
from .rules import composition
from .velocities import TargetVelocity, guided, velocity_option
from .weights import mean_square, squared_norm


@register("objectives", "shortcut")
@dataclass(frozen=True)
class ShortcutModel(Objective):
    """mean (u − u_tgt)² over the pixels; u_tgt = ½(u⁻(z, s, t) + u⁻(z_s, r, s)), s half-way, of an averaged network.

    A share `ratio` of the samples has steps t − r = 2^−k of all sizes but the smallest, alike many of each, at times t
    that are multiples of the step; the others have the smallest, 1/timesteps, and the target v. Guidance is in the
    target of the smallest steps that are composed, which hand it on to larger ones. The authors take the images of the
    first samples twice and the last ones not at all; here every sample is taken once.

    Args:
        ratio: share of samples with a composed target, in [0, 1]
        timesteps: the smallest step is one over this, a power of 2
        guidance: scale of classifier-free guidance in the target; 1 is none
        target_ema: of the averaged network; 0: targets are the network's own
        clip: largest absolute value of targets, and of the points between the steps
        noise_floor: share of the noise that is left at t = 0
        label_dropout: share of the samples with target v trained without their label, in [0, 1]
        velocity: what the target starts from: that of data and noise, a teacher's, or an average
        form: what the network returns
        sampling: how images are drawn
    """

    paper = ("2410.12557",)
    formula = "u → ½(u⁻(z, s, t) + u⁻(z_s, r, s)), s half-way, u⁻ averaged"

    ratio: float = option(0.125, low=0.0, high=1.0)
    timesteps: int = option(128, low=2)
    guidance: float = 1.5
    target_ema: float = option(0.999, low=0.0, high=1.0, below=True)
    clip: float = option(4.0, low=0.0, above=True)
    noise_floor: float = option(1e-5, low=0.0, high=1.0)
    label_dropout: float = option(0.1, low=0.0, high=1.0)
    velocity: TargetVelocity = velocity_option()
    form: Form = choice("forms", AverageVelocity, prefix="form_")
    sampling: Sampling = sampler_option(FewSteps)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps & (self.timesteps - 1):
            raise UsageError(f"expected a power of 2, got {self.timesteps}", field="timesteps")
        if isinstance(self.form, Shortcut) and self.form.timesteps != self.timesteps:
            raise UsageError(
                f"expected timesteps = {self.timesteps}, got {self.form.timesteps}", field="form_timesteps"
            )

    @property
    def path(self) -> LinearPath:  # type: ignore[override]
        """With some noise left in the data."""
        return LinearPath(self.noise_floor)

    def target_decay(self, step: int) -> float | None:
        """The same at every step."""
        return self.target_ema or None

    def draw_times(
        self, n: int, *, step: int = 0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Uniform numbers, of which `draw` makes times."""
        share = torch.rand(n, generator=generator, device=device)  # [B]
        return share, share

    def draw(self, shape: Sequence[int], **options: Any) -> Draws:
        """As `Objective.draw`."""
        draws = super().draw(shape, **options)
        steps = torch.where(draws.moved, self.composed(draws.moved.cumsum(0) - 1, draws.rows), self.timesteps)  # [B]
        t, r = self.times((draws.t * steps).floor(), steps)  # [B] each
        return dataclasses.replace(draws, t=t, r=r)

    def composed(self, rank: Tensor, rows: int) -> Tensor:
        """The number 2^k of steps in [0, 1] of the samples by their rank (n,) among the `rows` composed ones, (n,)."""
        sizes = int(math.log2(self.timesteps))
        each = rows // sizes  # samples of a size; what is left over has the largest
        return 2 ** (sizes - 1 - rank // each).clamp_min(0) if each else torch.ones_like(rank)

    def times(self, index: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """t and r of the `index`-th step from noise (n,), where there are `steps` (n,), (n,) each."""
        t = 1 - index / steps  # [n]
        return t, t - 1 / steps

    def is_moved(self, t: Tensor, r: Tensor) -> Tensor:
        """Those with more than the smallest step."""
        return (t - r) * self.timesteps > 1.5

    def dropped(self, drop: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Those with target v."""
        return drop & ~self.is_moved(t, r)

    def terms(self, b: Rows, nets: Networks) -> Terms:
        """mean (u − u_tgt)²."""
        net, n = nets.ema or b.net, b.moved
        smallest = (b.t - b.r)[:n] * self.timesteps < 2.5  # [moved]
        scale: Any = 1.0
        if self.guidance != 1.0:
            scale = b.column(torch.where(smallest, self.guidance, 1.0))  # [moved, 1, …]

        def step(z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return guided(net, z, r, t, y, scale=scale, no_label=b.no_label if self.guidance != 1.0 else -1)

        s = (b.t + b.r) / 2  # [B]
        pair = composition(b, b.v, s, first=step, second=step, clip=self.clip)
        away = pair.u - pair.u_tgt  # [B, …]
        return Terms(
            mean_square(away), {"squared_error": squared_norm(away.detach())}, pair.u, None, b.v, {"u_tgt": pair.u_tgt}
        )
