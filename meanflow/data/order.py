"""Which samples a training step sees: a pure function of (seed, step), the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor
from torch.utils.data import Sampler

_MASK = 2**64 - 1


class Stream(IntEnum):
    """What random numbers are for, after the seed: each purpose has a stream of its own."""

    ORDER = 1  # of the samples, by epoch
    FLIPS = 2  # by step
    SPLIT = 3  # into training and held-out images, by class
    DRAWS = 4  # of the objective, by step
    SAMPLES = 5  # noise of generated images
    NETWORK = 6  # what a network draws itself in training, such as dropout, by step and part
    LATENTS = 7  # of a posterior, by step


def mix(*parts: int) -> int:
    """A 32-bit seed from integers (splitmix64 over each), so that neighbouring steps get unrelated generators."""
    h = 0
    for part in parts:
        h = (h + part + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return h & 0xFFFFFFFF


def generator_for(*parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` whose seed is a hash of `parts`."""
    return torch.Generator(device=device).manual_seed(mix(*parts))


class StepOrder:
    """Epoch after epoch, each a new permutation, cut into batches without a seam.

    Step s takes positions s·batch_size … (s + 1)·batch_size − 1 of the stream; position p is item p mod n of the
    permutation of epoch p // n. Nothing is dropped and nothing depends on what was drawn before, so a run continues
    from its step alone.

    Args:
        n: number of samples, at least 1.
        batch_size: samples of one step, over all processes and accumulated micro-batches.
        seed: of the run.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"n, batch_size: expected at least 1, got {n} and {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = torch.randperm(self.n, generator=generator_for(self.seed, Stream.ORDER, epoch))
        return self._epochs[epoch]

    def batch(self, step: int) -> Tensor:
        """(batch_size,) indices of step `step` (counted from 0)."""
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while first < end:
            epoch, offset = divmod(first, self.n)
            parts.append(self._permutation(epoch)[offset : offset + end - first])
            first += len(parts[-1])
        return torch.cat(parts)

    def flips(self, step: int) -> Tensor:
        """(batch_size,) bool: which samples of step `step` are mirrored, where mirroring is on."""
        return torch.rand(self.batch_size, generator=generator_for(self.seed, Stream.FLIPS, step)) < 0.5


def shard(batch: Tensor, *, micro: int, micros: int, rank: int, world: int) -> Tensor:
    """The rows of a step's batch that process `rank` of `world` takes in micro-batch `micro` of `micros`."""
    rows = len(batch) // (micros * world)
    first = (micro * world + rank) * rows
    return batch[first : first + rows]


class StepSampler(Sampler[list[int]]):
    """Batch sampler of one process: micro-batches of steps `start` … `stop` − 1 in order.

    Args:
        mirrored: half of the indices, those of `StepOrder.flips`, are of mirrored versions: larger by `order.n`.
    """

    def __init__(
        self, order: StepOrder, *, start: int, stop: int, micros: int, rank: int, world: int, mirrored: bool = False
    ) -> None:
        self.order, self.start, self.stop = order, start, stop
        self.micros, self.rank, self.world, self.mirrored = micros, rank, world, mirrored

    def __len__(self) -> int:
        return (self.stop - self.start) * self.micros

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            batch = self.order.batch(step)
            if self.mirrored:
                batch = batch + self.order.n * self.order.flips(step)
            for micro in range(self.micros):
                yield shard(batch, micro=micro, micros=self.micros, rank=self.rank, world=self.world).tolist()
