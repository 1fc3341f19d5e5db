"""Batches for one process of a training run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UsageError
from .digits import load_digits_data
from .folder import FolderImages, load_folder
from .images import ImageData, ImageSource, TensorImages
from .left_out import LeftOut
from .order import StepOrder, StepSampler


def load_data(data: str, *, image_size: int, grey: bool, held_out: float, skip_unreadable: bool = False) -> ImageData:
    """The data set called "digits", or the folder of images at that path.

    Args:
        skip_unreadable: leave images out that cannot be read (see `load_folder`).

    Raises:
        UsageError: it cannot be used; the message says why.
    """
    if data == "digits":
        return load_digits_data(held_out)
    if not data:
        raise UsageError("data: say what to train on: `meanflow train digits`, or `meanflow train --data FOLDER`")
    return load_folder(
        Path(data).expanduser(),
        image_size=image_size,
        grey=grey,
        held_out=held_out,
        skip_unreadable=skip_unreadable,
    )


def located(data: str) -> str:
    """`data` as `load_data` finds it from any working directory."""
    return data if data in ("", "digits") else str(Path(data).expanduser().resolve())


class _Guarded(Dataset[Any]):
    """Hands what is wrong with an image back as data: raised in a worker process, an error's message would drown in a
    traceback, and what a worker leaves out its record alone would know."""

    def __init__(self, source: ImageSource, left_out: LeftOut | None) -> None:
        self.source, self.left_out = source, left_out

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, str]] | UsageError:
        try:
            x, y = self.source[index]
        except UsageError as error:
            return UsageError(str(error))  # of a class that every process can unpickle
        return x, y, self.left_out.take() if self.left_out is not None else {}


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, dict[str, str]] | UsageError:
    for item in items:
        if isinstance(item, UsageError):
            return item
    new = {path: reason for _, _, some in items for path, reason in some.items()}
    return torch.stack([x for x, _, _ in items]), torch.tensor([y for _, y, _ in items]), new


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one saves first and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) of every micro-batch of steps `start` … `stop` − 1 for process `rank` of `world`.

    Images that are left out are named on stderr when they are met.

    Args:
        workers: processes that decode images ahead; images in memory need none.
    """
    sampler = StepSampler(order, start=start, stop=stop, micros=micros, rank=rank, world=world)
    workers = 0 if isinstance(source, TensorImages) else workers
    left_out = source.left_out if isinstance(source, FolderImages) else None
    loader: DataLoader[Any] = DataLoader(
        _Guarded(source, left_out),
        batch_sampler=sampler,
        collate_fn=_collate,
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
