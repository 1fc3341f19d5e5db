"""Checks of what the objectives are given: batches, draws, and options that hang together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_finite, check_floating, check_label_range, check_labels
from ..errors import UsageError
from ..sampling import Sampling
from .rows import Net


def check_sampler(objective: Any, sampling: Sampling) -> None:
    """Raise a UsageError unless the networks of an objective are what a sampler calls."""
    outputs: tuple[str, ...] | None = getattr(sampling, "outputs", None)
    missing = [name for name in getattr(sampling, "keywords", ()) if name not in objective.keywords]
    fits = objective.outputs[0] == "u" if outputs is None else objective.outputs == outputs
    if not fits or missing:
        needs = f"networks that return ({', '.join(outputs or ('u',))})" if not fits else f"networks told {missing[0]}"
        name = type(objective).__name__
        raise UsageError(
            f"{type(sampling).__name__} draws from {needs}, which those of {name} are not", field="sampler"
        )


def check_mix(objective: Any) -> None:
    """Raise a UsageError unless guidance_interval, omega and kappa of MeanFlow's guidance make sense."""
    interval = tuple(objective.guidance_interval)
    if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1] <= 1.0:
        raise UsageError(
            f"expected 0 <= low <= high <= 1, got {objective.guidance_interval}", field="guidance_interval"
        )
    if getattr(objective, "kappa", 0.0) >= 1.0 and objective.omega != 0.0:
        raise UsageError(
            f"expected less than 1 (the effective scale is omega/(1 − kappa)), got {objective.kappa}", field="kappa"
        )


def check_time_sampler(sampler: Any) -> None:
    """Raise unless `sampler` draws times."""
    if isinstance(sampler, type) or not callable(getattr(sampler, "sample", None)):
        raise TypeError(f"time_sampler: expected a TimeSampler, such as LogitNormal() or Uniform(), got {sampler!r}")


def check_batch(net: Net, x: Tensor, y: Tensor) -> None:
    """Raise unless x is a batch of finite floating-point samples, and y has a label that `net` knows for each."""
    check_floating("x", x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"x: expected (B, …) with at least one sample, got shape {tuple(x.shape)}")
    check_labels(y, x.shape[0], "x")
    if y.device != x.device:
        raise ValueError(f"y: expected the device of x, {x.device}, got {y.device}")
    check_label_range(y, net)
    check_finite("x", x)


def check_draws(x: Tensor, noise: Tensor, *, drop: Tensor | None, t: Tensor, r: Tensor, **others: Tensor) -> None:
    """Raise unless the draws of a batch fit x; `others` are further (B,) tensors by name."""
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
        if a.shape != x.shape[:1] and (name in ("t", "r", "drop") or a.shape != x.shape):
            raise ValueError(f"{name}: expected shape ({x.shape[0]},), the batch of x, got {tuple(a.shape)}")


def check_times(t: Tensor, r: Tensor, name: str = "r") -> None:
    """Raise unless 0 <= r <= t <= 1 in every row, which is read on the host; r by another `name`."""
    if not bool(((r >= 0) & (r <= t) & (t <= 1)).all()):  # NaN fails too
        if bool((r > t).any()):
            raise ValueError(f"{name}: expected {name} <= t in every row")
        raise ValueError(f"t, {name}: expected times in [0, 1] in every row")
