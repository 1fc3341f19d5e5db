"""The learning rate of a step."""

from __future__ import annotations

import math

from ..config import Optim


def learning_rate(step: int, optim: Optim) -> float:
    """Learning rate of step `step` (counted from 0): linear warm-up that ends at `lr`, then constant or a half cosine.

    The half cosine falls from `lr` at the end of the warm-up towards zero, which it would reach at step `steps`.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
