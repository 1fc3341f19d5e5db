"""Tangents of memory that is written to in place, so that a write through one view is seen through every other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rows import Rows


class Memory:
    """The tangent of a piece of memory that several tensors share.

    Until the first write it only remembers the tensor that the others are views of, and each of them has a tangent of
    its own. From then on `buffer` mirrors the memory, and a tensor's tangent is `buffer` with that tensor's strides.
    Where the samples lie one after the other, the buffer holds those that carry tangents; otherwise it holds all of
    the memory, and what has none is zero.
    """

    __slots__ = ("active", "apart", "batch", "buffer", "primal", "rows", "start", "step", "tangent")

    def __init__(self, primal: Tensor, tangent: Tensor | None, rows: Rows | None, batch: int, active: int) -> None:
        self.primal, self.tangent, self.rows = primal, tangent, rows
        self.batch, self.active = batch, active
        self.apart = False  # whether a conj() of it was taken, which is a copy and sees no later write
        self.buffer: Tensor | None = None
        self.start = self.step = 0  # of the first sample, and of the next; a step of 0: all of the memory

    def read(self, x: Tensor, rows: Rows | None) -> tuple[Tensor | None, Rows | None]:
        """The tangent of `x` and the rows of `x` that it is of; (None, None) where it is zero."""
        assert self.buffer is not None
        if x.is_complex() != self.buffer.is_complex():
            self._hold_everything()
            pairs = self.buffer.view(-1, 2) if x.is_complex() else self.buffer
            buffer = torch.view_as_complex(pairs) if x.is_complex() else torch.view_as_real(pairs)
            return buffer.view(-1).as_strided(x.shape, x.stride(), x.storage_offset()), None
        if self.step:
            rows = rows or self._rows_of(x)
            first, last = _extent(x)
            end = self.start + self.active * self.step
            if rows is not None and rows.outer == 1:
                shape = rows.shape(x.shape)
                return self.buffer.as_strided(shape, x.stride(), first - self.start), rows
            if first >= end:
                return None, None
            if last < end:
                return self.buffer.as_strided(x.shape, x.stride(), first - self.start), None
            self._hold_everything()
        return self.buffer.as_strided(x.shape, x.stride(), x.storage_offset()), None

    def write(self, x: Tensor, rows: Rows | None, tangent: Tensor | None, tangent_rows: Rows | None) -> None:
        """Make `tangent`, of the rows `tangent_rows`, that of `x`, whose batch is at `rows` where that is known."""
        if self.buffer is None:
            self._begin(tangent_rows)
        into, here = self.read(x, rows)
        if tangent is None:
            if into is not None:
                into.zero_()
            return
        if into is None or here != tangent_rows:
            self._hold_everything()
            into, _ = self.read(x, rows)
            assert into is not None
            tangent = tangent if tangent_rows is None else tangent_rows.fill(tangent)
        into.copy_(tangent)

    def _begin(self, rows: Rows | None) -> None:
        p, known = self.primal, self.rows
        if known is None and self.tangent is None and rows is not None:
            known = self._whole(p)
        size = p.untyped_storage().nbytes() // p.element_size()
        if known is not None and known.outer == 1 and known.batch == self.batch:
            step = p.stride(known.axis) * known.inner
            sample = [known.inner if i == known.axis else n for i, n in enumerate(p.shape)]
            within = sum((n - 1) * s for n, s in zip(sample, p.stride(), strict=True))
            first: Any = p.storage_offset()
            if 0 <= within < step and (self.tangent is not None or (first == 0 and step * self.batch == size)):
                self.start, self.step, size = first, step, self.active * step
        self.buffer = torch.zeros(size, dtype=p.dtype, device=p.device)
        if self.tangent is not None:
            if self.step:
                assert known is not None
                offset: Any
                shape, offset, t = known.shape(p.shape), 0, self.tangent
            else:
                shape, offset = list(p.shape), p.storage_offset()
                t = self.tangent if known is None else known.fill(self.tangent)
            self.buffer.as_strided(shape, p.stride(), offset).copy_(t)
        self.tangent = None

    def _hold_everything(self) -> None:
        assert self.buffer is not None
        if not self.step:
            return
        p, old = self.primal, self.buffer
        self.buffer = old.new_zeros(p.untyped_storage().nbytes() // p.element_size())
        self.buffer[self.start : self.start + old.numel()] = old
        self.start = self.step = 0

    def _whole(self, x: Tensor) -> Rows | None:
        """The batch in a plain tensor that is all of its memory, samples one after the other."""
        if not x.is_contiguous() or x.ndim == 0 or x.shape[0] % self.batch:
            return None
        return Rows(0, 1, self.batch, x.shape[0] // self.batch, self.active)

    def _rows_of(self, x: Tensor) -> Rows | None:
        """The batch in a plain view of the memory."""
        if x.storage_offset() - self.start >= self.step:
            return None
        for axis, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True)):
            if 0 < s <= self.step and n * s == self.batch * self.step and self.step % s == 0:
                return Rows(axis, 1, self.batch, self.step // s, self.active)
        return None


def _extent(x: Tensor) -> tuple[Any, Any]:
    """The first and the last element of its memory that `x` has."""
    first = x.storage_offset()
    return first, first + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
