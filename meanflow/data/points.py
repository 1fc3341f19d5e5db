"""2-D points in classes: what a method does to a distribution, seen in a picture after seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UsageError
from ..options import option
from ..registry import register
from .images import ImageData, TensorImages, stratified_split
from .sources import DataSource

Draw = Callable[[Tensor, torch.Generator], Tensor]  # labels (n,), generator -> points (n, 2)


def _moons(label: Tensor, generator: torch.Generator) -> Tensor:
    """Two half circles that interlock."""
    angle = math.pi * torch.rand(len(label), generator=generator)  # [n]
    side = 1.0 - 2.0 * label  # [n]
    points = torch.stack([angle.cos() - 0.5 * side, side * (angle.sin() - 0.25)], dim=1)  # [n, 2]
    return points + 0.05 * torch.randn(points.shape, generator=generator)


def _checkerboard(label: Tensor, generator: torch.Generator) -> Tensor:
    """The eight black squares of a 4×4 board, the two in a row one class."""
    column = 2 * torch.randint(2, (len(label),), generator=generator) + label % 2  # [n]
    return torch.stack([column, label], dim=1) + torch.rand(len(label), 2, generator=generator)  # [n, 2]


def _spirals(label: Tensor, generator: torch.Generator) -> Tensor:
    """Two arms of one turn and a half, opposite to each other."""
    turn = torch.rand(len(label), generator=generator).sqrt() * 3.0 * math.pi  # [n]
    angle = turn + math.pi * label  # [n]
    points = turn[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) / (3.0 * math.pi)  # [n, 2]
    return points + 0.02 * torch.randn(points.shape, generator=generator)


def _rings(label: Tensor, generator: torch.Generator) -> Tensor:
    """Three concentric circles."""
    angle = 2.0 * math.pi * torch.rand(len(label), generator=generator)  # [n]
    points = (1.0 + label)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)  # [n, 2]
    return points + 0.08 * torch.randn(points.shape, generator=generator)


def _gaussians(label: Tensor, generator: torch.Generator) -> Tensor:
    """Eight Gaussians on a circle."""
    angle = 0.25 * math.pi * label  # [n]
    points = torch.stack([angle.cos(), angle.sin()], dim=1)  # [n, 2]
    return points + 0.1 * torch.randn(points.shape, generator=generator)


_SHAPES: dict[str, tuple[Draw, tuple[str, ...]]] = {
    "moons": (_moons, ("upper", "lower")),
    "checkerboard": (_checkerboard, ("row 1", "row 2", "row 3", "row 4")),
    "spirals": (_spirals, ("one", "other")),
    "rings": (_rings, ("inner", "middle", "outer")),
    "gaussians": (_gaussians, tuple(f"{45 * i} degrees" for i in range(8))),
}


@register("data", "points")
@dataclass(frozen=True)
class Points(DataSource):
    """2-D points as images of shape (2, 1, 1), in classes; mean 0 and standard deviation 1 on each axis.

    Unlike pixels they are not bounded by [-1, 1]: `--evaluator points` measures them. They are the same in every run.

    Args:
        shape: where they lie: two interlocking half circles, four rows of a checkerboard, two arms of a spiral, three
            circles, or eight Gaussians
        count: number of points, as many of each class
    """

    shape: Literal["moons", "checkerboard", "spirals", "rings", "gaussians"] = "moons"
    count: int = option(8192, low=100, high=2**24)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in _SHAPES:
            raise UsageError(f"expected one of {', '.join(_SHAPES)}, got {self.shape!r}", field="shape")
        if self.flip:
            raise UsageError("expected only with images: points have no mirrored side", field="flip")

    def load(self) -> ImageData:
        """(2, 1, 1) points in two to eight classes, float32."""
        draw, names = _SHAPES[self.shape]
        labels = torch.arange(self.count) % len(names)  # [n]
        points = draw(labels, torch.Generator().manual_seed(0))  # [n, 2]
        points = (points - points.mean(dim=0)) / points.std(dim=0)
        images = points[:, :, None, None]  # [n, 2, 1, 1]
        train, kept = stratified_split(labels, self.held_out)
        return ImageData(
            name=self.shape,
            train=TensorImages(images[train], labels[train]),
            held_out=TensorImages(images[kept], labels[kept]) if len(kept) else None,
            class_names=names,
            channels=2,
            image_size=1,
        )

    def located(self) -> dict[str, Any]:
        """Shape and number of the points."""
        return {"shape": self.shape, "count": self.count}
