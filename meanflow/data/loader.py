"""Batches for one process of a training run."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UsageError
from .encoded import DecodedImages
from .images import ImageSource, TensorImages
from .left_out import LeftOut
from .order import StepOrder, StepSampler

Batch = tuple[Tensor, Tensor, dict[str, str]]  # images, labels, and the reasons of those that were left out


class _Guarded(Dataset[Any]):
    """Hands what is wrong with an image back as data: raised in a worker process, an error's message would drown in a
    traceback, and what a worker leaves out its record alone would know."""

    def __init__(self, source: ImageSource, left_out: LeftOut | None) -> None:
        self.source, self.left_out = source, left_out

    def __getitems__(self, indices: list[int]) -> Batch | UsageError:
        try:
            x, y = self._batch(indices)
        except UsageError as error:
            return UsageError(str(error))  # of a class that every process can unpickle
        return x, y, self.left_out.take() if self.left_out is not None else {}

    def _batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if hasattr(self.source, "batch"):
            return self.source.batch(indices)
        items = [self.source[i] for i in indices]
        return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one saves first and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(source: ImageSource, chosen: Iterable[list[int]], *, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) of each list of indices that is `chosen`.

    Images that are left out are named on stderr when they are met.

    Args:
        workers: processes that decode images ahead; images in memory need none.
    """
    workers = 0 if isinstance(source, TensorImages) else workers
    left_out = source.left_out if isinstance(source, DecodedImages) else None
    loader: DataLoader[Any] = DataLoader(
        _Guarded(source, left_out),
        batch_sampler=chosen,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
    )
    for batch in loader:
        if isinstance(batch, UsageError):
            raise batch
        x, y, new = batch
        if left_out is not None:
            for path, reason in new.items():
                left_out.add(path, reason)
            left_out.name_new()
        yield x, y


def micro_batches(
    source: ImageSource,
    order: StepOrder,
    *,
    start: int,
    stop: int,
    micros: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    mirrored: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) of every micro-batch of steps `start` … `stop` − 1 for process `rank` of `world`.

    Args:
        workers: as of `batches`.
        mirrored: mirrored versions, which the source has, in the places of half of the images.
    """
    sampler = StepSampler(order, start=start, stop=stop, micros=micros, rank=rank, world=world, mirrored=mirrored)
    return batches(source, sampler, workers=workers)
