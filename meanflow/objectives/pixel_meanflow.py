"""Pixel MeanFlow (pMF, arXiv 2601.22158): improved MeanFlow of a network that returns the image."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..options import option
from ..registry import register
from .forms import DataPrediction, Form
from .improved_meanflow import ImprovedMeanFlow
from .path import LinearPath, column


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
    """

    t_min: float = option(0.05, low=0.0, high=1.0, above=True)
    noise_scale: float = option(1.0, low=0.0, above=True)

    form: Form = field(init=False)
    path: LinearPath = field(init=False)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        # both divide by the same least time
        object.__setattr__(self, "form", DataPrediction(t_min=self.t_min))
        object.__setattr__(self, "path", ClippedPath(t_min=self.t_min, noise_scale=self.noise_scale))
