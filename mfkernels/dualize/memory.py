"""Tangents of memory that is written to in place: a write through one view changes the tangents of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Rows, Slot


class Memory:
    """The tangent of a piece of memory that several tensors share.

    Before the first write there is no buffer, and each tensor has a tangent of its own. After it, `buffer` has the
    layout of the memory, and a tensor's tangent is `buffer` with that tensor's strides. Where samples are stored one
    after the other, the buffer covers those with tangents; otherwise it covers all of the memory, with zeros where
    there is no tangent.

    primal, slot: the tensor that the others are views of, and its tangent before the first write.
    copied: whether `conj()` of the memory was taken, which is a copy here and does not change with later writes.
    start, step: the offsets of the first sample and from one sample to the next; 0, 0: the buffer covers everything.
    """

    copied = False
    buffer: Tensor | None = None
    start: Any = 0
    step: Any = 0

    def __init__(self, primal: Tensor, slot: Slot | None, batch: int, active: int) -> None:
        self.primal, self.slot, self.batch, self.active = primal, slot, batch, active

    def read(self, x: Tensor, rows: Rows | None) -> Slot | None:
        """The tangent of `x`, of `rows` if they are given; None where it is zero."""
        assert self.buffer is not None
        if x.is_complex() != self.buffer.is_complex():
            self._cover_all_memory()
            pairs = self.buffer.view(-1, 2) if x.is_complex() else self.buffer
            buffer = torch.view_as_complex(pairs) if x.is_complex() else torch.view_as_real(pairs)
            return Slot(x, buffer.view(-1).as_strided(x.shape, x.stride(), x.storage_offset()), None)
        if self.step:
            rows = rows or self._rows_of(x)
            if rows is not None and rows.outer == 1:
                return Slot(x, self._at(x, rows.shape(x.shape)), rows)
            first, end = x.storage_offset(), self.start + self.active * self.step
            if first >= end:
                return None
            if first + _extent(x.shape, x.stride()) >= end:
                self._cover_all_memory()
        return Slot(x, self._at(x, x.shape), None)

    def _at(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The tangent of `x`, or of its first rows, as a view of the buffer."""
        assert self.buffer is not None
        return self.buffer.as_strided(shape, x.stride(), x.storage_offset() - self.start)

    def write(self, x: Tensor, rows: Rows | None, tangent: Tensor | None, tangent_rows: Rows | None) -> None:
        """Write `tangent`, of `tangent_rows`, as that of `x`, whose batch is at `rows` if they are given."""
        if self.buffer is None:
            self._begin(tangent_rows)
        into = self.read(x, rows)
        if tangent is None:
            if into is not None:
                into.tangent.zero_()
            return
        if into is None or into.rows != tangent_rows:
            self._cover_all_memory()
            into = self.read(x, rows)
            assert into is not None
            tangent = tangent if tangent_rows is None else tangent_rows.fill(tangent)
        into.tangent.copy_(tangent)

    def _begin(self, rows: Rows | None) -> None:
        p, known = self.primal, None if self.slot is None else self.slot.rows
        if self.slot is None and rows is not None and p.is_contiguous() and p.ndim and p.shape[0] % self.batch == 0:
            known = Rows(0, 1, self.batch, p.shape[0] // self.batch, self.active)  # samples one after the other
        size = p.untyped_storage().nbytes() // p.element_size()
        if known is not None and known.outer == 1 and known.batch == self.batch:
            step, first = p.stride(known.axis) * known.inner, p.storage_offset()
            sample = [known.inner if i == known.axis else n for i, n in enumerate(p.shape)]
            all_of_it = first == 0 and step * self.batch == size
            if 0 <= _extent(sample, p.stride()) < step and (self.slot is not None or all_of_it):
                self.start, self.step, size = first, step, self.active * step
        self.buffer = torch.zeros(size, dtype=p.dtype, device=p.device)
        if self.slot is not None:
            t = self.slot.tangent if known is None or self.step else known.fill(self.slot.tangent)
            self._at(p, t.shape).copy_(t)
        self.slot = None

    def _cover_all_memory(self) -> None:
        assert self.buffer is not None
        if self.step:
            p, old = self.primal, self.buffer
            self.buffer = old.new_zeros(p.untyped_storage().nbytes() // p.element_size())
            # the last sample may end before the next would begin
            into = self.buffer[self.start :][: old.numel()]
            into.copy_(old[: len(into)])
            self.start = self.step = 0

    def _rows_of(self, x: Tensor) -> Rows | None:
        """Where the batch is in a view of the memory, by its strides; None if it cannot be told."""
        if x.storage_offset() - self.start >= self.step:
            return None
        for axis, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True)):
            if 0 < s <= self.step and n * s == self.batch * self.step and self.step % s == 0:
                return Rows(axis, 1, self.batch, self.step // s, self.active)
        return None


def _extent(shape: Any, strides: Any) -> Any:
    """How far the last element is from the first."""
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
