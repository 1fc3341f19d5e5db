"""What a paper reports of a recipe: a recipe may carry it, and a plain function that returns a `Config` need not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Config
from ..registry import find


@dataclass(frozen=True)
class Published:
    """A row of a paper.

    paper: arXiv number.
    data: what was trained on.
    shape: (C, H, W) of a training sample.
    num_classes: of the data.
    protocol: how the figures were got: samples, steps, guidance.
    fid: Fréchet Inception distance by the number of network evaluations, in words; empty: nothing is published for
        this network.
    table: where those are from; "" where there are none.
    epochs: passes over the data, rounded.
    parameters: of the network that images are drawn from, in millions, as published; None: not for this network.
    differs: what is not the authors', in one or more sentences; "" where nothing is known to be.
    """

    paper: str
    data: str
    shape: tuple[int, int, int]
    protocol: str
    fid: Mapping[str, float] = field(default_factory=dict)
    table: str = ""
    num_classes: int = 1000
    epochs: int | None = None
    parameters: float | None = None
    differs: str = ""


@dataclass(frozen=True)
class PublishedRecipe:
    """A recipe with what its paper reports."""

    make: Callable[[], Config]
    published: Published

    def __call__(self) -> Config:
        return self.make()


def published(name: str) -> Published | None:
    """What the paper of a recipe reports; None: the recipe does not say.

    Raises:
        UsageError: there is no such recipe.
    """
    found: Any = find("recipes", name)
    return found.published if isinstance(found, PublishedRecipe) else None
