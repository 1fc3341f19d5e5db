"""The learning rate of a step."""

from __future__ import annotations

import math

from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (counted from 0): linear warm-up that ends at `lr`, then constant or a half cosine.

    The half cosine falls from `lr` at the end of the warm-up towards zero, which it would reach at step `steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
