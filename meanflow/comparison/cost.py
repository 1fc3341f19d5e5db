"""What a training step of a configuration costs: products, seconds and peak memory of forward, loss and backward."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfkernels import use_backend
from mfkernels.measuring import flops_of, interleaved_seconds, peak_bytes

from ..config import Config
from ..data import ImageData
from ..objectives import Draws, Networks

MOMENTS = 10  # of a run, evenly spaced, whose phases are counted
ROUNDS = 5  # of timing, of which the fastest counts


class Cost(NamedTuple):
    """A step's cost, the mean over the phases of a run.

    flops: multiplications and additions in products; the same on every machine.
    seconds: the fastest of a few, taken in turns with a step of the yardstick.
    ratio: seconds over the yardstick's.
    peak_bytes: memory allocated during the step over what was there before, in the phase that needs most.
    """

    flops: float
    seconds: float
    ratio: float
    peak_bytes: int


class Step:
    """Forward, loss and backward of one training step on random data, with fresh weights.

    Args:
        config: the run.
        data: what it trains on, of which shape and number of classes count.
        teacher: u(z, r, t, y) for an objective that learns from one.
        device: of the run; "meta": its products can be counted, at no cost in memory or computation.
    """

    def __init__(self, config: Config, data: ImageData, teacher: Any, device: str) -> None:
        self.objective = config.objective
        drawn_on = "cpu" if device == "meta" else device  # there are no random numbers on meta
        with torch.random.fork_rng(), torch.device("meta" if device == "meta" else "cpu"):
            torch.manual_seed(0)
            self.net = config.network(data).to(device)
            learned = self.objective.learned_module()
        averaged = copy.deepcopy(self.net).requires_grad_(False) if self.objective.target_decay(0) is not None else None
        frozen = teacher if "frozen" in self.objective.teachers else None
        self.nets = Networks(ema=averaged, frozen=frozen, learned=None if learned is None else learned.to(device))
        generator = torch.Generator(drawn_on).manual_seed(0)
        batch = config.optim.batch_size
        shape = (batch, *config.codec.latent_shape(data.image_shape))
        self.x = torch.randn(shape, generator=generator, device=drawn_on).to(device)  # [B, C, H, W]
        self.y = torch.randint(data.num_classes, (batch,), generator=generator, device=drawn_on).to(device)  # [B]
        self.phases: Counter[str] = Counter()
        self.draws: dict[str, Draws] = {}
        for moment in range(MOMENTS):
            step = int((moment + 0.5) / MOMENTS * config.optim.steps)
            draws = self.objective.draw(shape, step=step, generator=generator, device=drawn_on, spread=True)
            draws = draws.map(lambda a: a.to(device))
            self.phases[draws.phase] += 1
            self.draws.setdefault(draws.phase, draws)

    def __call__(self, phase: str) -> Tensor:
        self.net.zero_grad(set_to_none=True)
        loss = self.objective.loss(self.net, self.x, self.y, self.draws[phase], self.nets).loss
        loss.backward()
        return loss.detach()

    def flops(self) -> float:
        """FLOPs of a step, the mean over a run's phases: by plain PyTorch, whose products alone are seen."""
        with use_backend("reference"):
            return sum(n * flops_of(partial(self, phase)) for phase, n in self.phases.items()) / MOMENTS


def cost_of(step: Step, base: Step) -> Cost:
    """What a step costs, beside a step of the yardstick `base`, which has one phase."""
    calls: dict[str, Any] = {phase: partial(step, phase) for phase in step.phases}
    usual = next(iter(base.phases))
    times = interleaved_seconds({**calls, _BASE: partial(base, usual)}, rounds=ROUNDS)
    seconds = sum(n * min(times[phase]) for phase, n in step.phases.items()) / MOMENTS
    peak = 0
    for call in calls.values():
        step.net.zero_grad(set_to_none=True)  # gradients of the step before would be freed within this one
        peak = max(peak, peak_bytes(call, step.x.device))
    return Cost(step.flops(), seconds, seconds / min(times[_BASE]), peak)


_BASE = "yardstick"  # no name of a phase


@contextmanager
def threads(number: int) -> Iterator[None]:
    """As many CPU threads as a run asks for; 0: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
