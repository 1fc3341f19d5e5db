"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .parallel import local_shard


def ema_decay_at(step: int, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): the average forgets the first weights quickly."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Averaged parameters in float32, w̄ ← d·w̄ + (1 − d)·w with d = `ema_decay_at(step, decay)`.

    Where the model is sharded over processes (FSDP2), each averages its own shards.

    Args:
        model: whose `named_parameters` are averaged.
        decay: d after the warm-up, in [0, 1); 0 keeps a copy of the current weights.
        recordable: keep 1 − d in the memory of the device, where a CUDA graph that holds `take` finds that of its step.
    """

    def __init__(self, model: nn.Module, decay: float, *, recordable: bool = False) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in _parameters(model)}
        self._now = decay
        self._weight = next(iter(self.weights.values())).new_zeros(()) if recordable else None

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step` (counted from 0)."""
        self.set_step(step)
        self.take(model)

    def set_step(self, step: int) -> None:
        """Make ready for the weights after step `step`."""
        self._now = ema_decay_at(step, self.decay)
        if self._weight is not None:
            self._weight.fill_(1.0 - self._now)

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Take in the weights of the step that was set; reads nothing on the host."""
        averages = [local_shard(average) for average in self.weights.values()]
        current = [local_shard(p.detach()).float() for _, p in _parameters(model)]
        if self._weight is None:
            get_ema_multi_avg_fn(self._now)(averages, current, None)
            return
        for average, weights in zip(averages, current, strict=True):
            average.lerp_(weights, self._weight)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over saved averages of the same names and shapes."""
        for name, average in self.weights.items():
            average.copy_(weights[name])


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """By every name, where several share a parameter: a state dict has them all."""
    return list(model.named_parameters(remove_duplicate=False))
