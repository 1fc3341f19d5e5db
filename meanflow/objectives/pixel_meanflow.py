"""Pixel MeanFlow (pMF, arXiv 2601.22158): improved MeanFlow of a network that returns the image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfkernels.dual import map_output

from ..options import choice, option
from ..registry import register
from ..sampling import Sampling
from .forms import DataPrediction, Form
from .improved_meanflow import ImprovedMeanFlow
from .path import LinearPath, column
from .rows import Net
from .time_samplers import LogitNormal, TimeSampler
from .velocities import DataVelocity, TargetVelocity


@dataclass(frozen=True)
class ClippedPath(LinearPath):
    """The linear path to noise_scale·e, with the velocity (z_t − x)/max(t, t_min)."""

    t_min: float = 0.05
    noise_scale: float = 1.0

    def point(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """z_t, (B, …), at times t (B,)."""
        return super().point(x, self.noise_scale * e, t)

    def velocity(self, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
        """(z_t − x)/max(t, t_min), (B, …)."""
        return (self.point(x, e, t) - x) / column(t.to(x.dtype).clamp(self.t_min, 1.0), x)


@register("objectives", "pmf")
@dataclass(frozen=True)
class PixelMeanFlow(ImprovedMeanFlow):
    """Improved MeanFlow whose network returns images x̂, u = (z − x̂)/max(t, t_min), with targets clipped alike.

    The perceptual losses (LPIPS, ConvNeXt features), which the authors add, stay out.

    Args:
        t_min: times below it are taken for it where one divides by them
        noise_scale: standard deviation of the noise; the authors take 1, 2 or 4 for larger images
        time_sampler: how the two times are drawn; the authors draw a tenth of them uniformly, and take mean 0 for some
            sizes
    """

    paper = ("2601.22158",)
    formula = "u + (t − r)·sg(du/dt) → v_g, u = (z − x̂)/t of a network that returns the image x̂"

    t_min: float = option(0.05, low=0.0, high=1.0, above=True)
    noise_scale: float = option(1.0, low=0.0, above=True)
    time_sampler: TimeSampler = choice("time_samplers", lambda: LogitNormal(0.8, 0.8), prefix="time_")

    velocity: TargetVelocity = field(init=False, default=DataVelocity())  # those of other paths do not fit this one
    form: Form = field(init=False)
    path: LinearPath = field(init=False)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        # both divide by the same least time
        object.__setattr__(self, "form", DataPrediction(t_min=self.t_min))
        object.__setattr__(self, "path", ClippedPath(t_min=self.t_min, noise_scale=self.noise_scale))

    def sampled(self, net: Net) -> Net:
        """The flow map of images over noise_scale, with standard normal noise; `generate` scales the images back."""
        wrapped, k = super().sampled(net), self.noise_scale
        return wrapped if k == 1.0 else ScaledNetwork(wrapped, k)

    def generate(
        self, net: Net, noise: Tensor, y: Tensor, sampling: Sampling, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `Objective.generate`."""
        return self.noise_scale * super().generate(net, noise, y, sampling, generator=generator)


class ScaledNetwork:
    """u(k·z, r, t, y, …)/k of a network u."""

    def __init__(self, net: Net, k: float) -> None:
        self.module, self.k = net, k

    def __call__(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor, **conditions: Any) -> Any:
        """(B, …), or all outputs of the network."""
        out = self.module(self.k * z, r, t, y, **conditions)
        return map_output(lambda u: u if u is None else u / self.k, out)
