"""What the objectives have in common: random draws, a loss that is a pure function of them, and its checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mfkernels.checks import check_number

from ..checks import check_finite, check_floating, check_label_range, check_labels
from .draws import Draws, choose_moved
from .time_samplers import TimeSampler

# u = net(z, r, t, y)
Net = Callable[..., Any]


@dataclass(frozen=True)
class ObjectiveOutput:
    """What one evaluation of an objective gives, in the caller's row order.

    loss: () mean of `per_sample`, differentiable.
    per_sample: (B,) weighted loss of each sample, detached.
    squared_error: (B,) ‖u − u_tgt‖² of each sample before weighting, detached.
    u: (B, C, H, W) the network's prediction, detached.
    du_dt: (B, C, H, W) its total derivative, zero where r = t, detached.
    v: (B, C, H, W) the guided velocity that it is trained towards.
    t, r: (B,) the times.
    """

    loss: Tensor
    per_sample: Tensor
    squared_error: Tensor
    u: Tensor
    du_dt: Tensor
    v: Tensor
    t: Tensor
    r: Tensor


Output = TypeVar("Output", bound=ObjectiveOutput)


class Objective(ABC, Generic[Output]):
    """A loss of a network, data and labels.

    ratio: share of samples with r ≠ t; label_dropout: of those trained without their label.
    """

    ratio: float
    label_dropout: float
    time_sampler: TimeSampler

    def __call__(self, net: Net, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Output:
        """Draw everything random (see `draw`) and evaluate the loss there.

        Args:
            net: as in `loss_at`; with attribute `num_classes` where labels are dropped or the target is guided.
            x: (B, C, H, W) data; any shape (B, …) that the network takes.
            y: (B,) integer labels.
            generator: source of the draws, on the device of `x`; default: PyTorch's global one.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_batch(x, y)
        return self.loss_of(net, x, y, self.draw(x.shape, generator=generator, device=x.device, dtype=x.dtype))

    def draw(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        spread: bool = False,
    ) -> Draws:
        """Everything random of a batch of this shape (B, C, H, W).

        Args:
            generator: source of the draws, on `device`; default: PyTorch's global one.
            spread: put the rows with r ≠ t at even distances (see `Draws.part`) instead of at random.
        """
        B = shape[0]
        e = torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)  # [B, C, H, W]
        t, r = self._draw_times(B, generator, device)
        drop = None
        if self.label_dropout > 0:
            drop = torch.rand(B, generator=generator, device=device) < self.label_dropout  # [B]
        moved, rows = choose_moved(B, self.ratio, spread=spread, generator=generator, device=device)
        conditions = self._draw_conditions(B, generator, device)
        return Draws(noise=e, t=t, r=torch.where(moved, r, t), moved=moved, rows=rows, drop=drop, conditions=conditions)

    def _draw_times(
        self, n: int, generator: torch.Generator | None, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Two independent times per sample, (n,) each, the larger one first."""
        pair = self.time_sampler.sample(2 * n, generator=generator, device=device).view(2, n)  # [2, B]
        return pair.amax(dim=0), pair.amin(dim=0)  # [B]

    def _draw_conditions(
        self, n: int, generator: torch.Generator | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        """Further draws, (n,) each, by the names that `loss_at` has for them."""
        return {}

    @abstractmethod
    def loss_of(self, net: Net, x: Tensor, y: Tensor, draws: Draws) -> Output:
        """The loss at what `draw` gave; nothing random, no read on the host: this is what a compiler takes whole."""


def check_shares_and_norm(objective: Any) -> None:
    """Raise unless `ratio`, `label_dropout`, `norm_p` and `norm_eps` of an objective are in their ranges and its
    `time_sampler` is one."""
    for name in ("ratio", "label_dropout"):
        if not 0.0 <= getattr(objective, name) <= 1.0:
            raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(objective, name)}")
    check_number("norm_p", objective.norm_p, 0)
    check_number("norm_eps", objective.norm_eps, 0, above=True)
    sampler = objective.time_sampler
    if isinstance(sampler, type) or not callable(getattr(sampler, "sample", None)):
        raise TypeError(f"time_sampler: expected a TimeSampler, such as LogitNormal() or Uniform(), got {sampler!r}")


def check_batch(x: Tensor, y: Tensor) -> None:
    """Raise unless x is a batch of floating-point samples and y has an integer label for each."""
    check_floating("x", x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"x: expected (B, …) with at least one sample, got shape {tuple(x.shape)}")
    check_labels(y, x.shape[0], "x")
    if y.device != x.device:
        raise ValueError(f"y: expected the device of x, {x.device}, got {y.device}")


def check_draws(
    net: Net, x: Tensor, y: Tensor, noise: Tensor, *, drop: Tensor | None, t: Tensor, r: Tensor, **others: Tensor
) -> None:
    """Raise unless the labels fit `net`, and they and the draws of a batch fit `x`, whose values are finite.

    `others` are further (B,) tensors by name. Values are read on a CPU only.
    """
    check_batch(x, y)
    check_label_range(y, net)
    check_finite("x", x)
    check_floating("noise", noise)
    if noise.shape != x.shape:
        raise ValueError(f"noise: expected the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")
    rows = {"t": t, "r": r, **others}
    for name, a in rows.items():
        check_floating(name, a)
    if drop is not None:
        if not isinstance(drop, Tensor):
            raise TypeError(f"drop: expected a tensor, got {type(drop).__name__}")
        if drop.dtype != torch.bool:
            raise TypeError(f"drop: expected bool, got {drop.dtype}")
        rows["drop"] = drop
    for name, a in rows.items():
        if a.shape != x.shape[:1]:
            raise ValueError(f"{name}: expected shape ({x.shape[0]},), the batch of x, got {tuple(a.shape)}")


def check_times(t: Tensor, r: Tensor) -> None:
    """Raise unless 0 <= r <= t <= 1 in every row, which is read on the host."""
    if not bool(((r >= 0) & (r <= t) & (t <= 1)).all()):  # NaN fails too
        if bool((r > t).any()):
            raise ValueError("r: expected r <= t in every row")
        raise ValueError("t, r: expected times in [0, 1] in every row")
