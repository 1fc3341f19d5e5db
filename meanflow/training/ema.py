"""Exponential moving averages of the weights: the one that is sampled from, and the one that makes targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .parallel import local_shard, reshard


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
        self._prepare(next(iter(self.weights.values())) if recordable else None)

    def _prepare(self, place: Tensor | None) -> None:
        self._now = 1.0
        self._weight = None if place is None else place.new_zeros(())

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step` (counted from 0)."""
        self.set_step(step)
        self.take(model)

    def decay_at(self, step: int) -> float:
        """d after this step."""
        return ema_decay_at(step, self.decay)

    def set_step(self, step: int) -> None:
        """Make ready for the weights after step `step`."""
        self._now = self.decay_at(step)
        if self._weight is not None:
            self._weight.fill_(1.0 - self._now)

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Take in the weights of the step that was set; reads nothing on the host."""
        self._blend(list(self.weights.values()), [p for _, p in _parameters(model)])

    def _blend(self, averages: list[Tensor], parameters: list[nn.Parameter]) -> None:
        averages = [local_shard(average) for average in averages]
        current = [local_shard(p.detach()).to(w.dtype) for w, p in zip(averages, parameters, strict=True)]
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


class TargetEMA(EMA):
    """The averages that are parameters of a second network, w̄ ← d·w̄ + (1 − d)·w; its buffers are the model's.

    Args:
        target: the second network.
        decay: d after a step counted from 0, see `Objective.target_decay`.
        recordable: as of `EMA`.
    """

    def __init__(self, target: nn.Module, decay: Callable[[int], float | None], *, recordable: bool = False) -> None:
        self.target, self.of_step = target, decay
        self._prepare(next(target.parameters()).detach() if recordable else None)

    def decay_at(self, step: int) -> float:
        """d after this step.

        Raises:
            TypeError: the objective gives no number in [0, 1].
        """
        d = self.of_step(step)
        if d is None or not 0.0 <= d <= 1.0:
            raise TypeError(f"target_decay: expected a number in [0, 1] at every step, got {d} at step {step}")
        return d

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """As of `EMA`."""
        reshard(self.target)
        # looked up anew: FSDP2 may put a shard into other memory at its first forward
        self._blend(list(self.target.parameters()), list(model.parameters()))
        for buffer, now in zip(self.target.buffers(), model.buffers(), strict=True):
            buffer.copy_(now)


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """By every name, where several share a parameter: a state dict has them all."""
    return list(model.named_parameters(remove_duplicate=False))
