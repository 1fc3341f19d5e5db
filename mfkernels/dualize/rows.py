"""Where the batch is in a tensor, and which part of it carries tangents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Untracked(Exception):
    """The batch of the result is no prefix along one dimension: this call is done with zero tangent rows filled in."""


class MixesRows(Exception):
    """The operation makes one sample's result depend on other samples."""


class Rows(NamedTuple):
    """Dimension `axis` of a tensor runs over (outer, batch, inner); the first `active` of `batch` carry tangents.

    A tangent is stored for those alone: its size along `axis` is outer·active·inner, elsewhere it is the primal's.
    [B, N, D] has axis 0 and (1, B, 1); flattened to [B·N, D] it has (1, B, N); moved to [N, B, D], axis 1, (1, B, 1);
    that flattened to [N·B, D], (N, B, 1).
    """

    axis: int
    outer: int
    batch: int
    inner: int
    active: int

    @property
    def size(self) -> int:
        return self.outer * self.batch * self.inner

    @property
    def kept(self) -> int:
        return self.outer * self.active * self.inner

    def at(self, axis: int) -> Rows:
        return self if axis == self.axis else Rows(axis, *self[1:])

    def take(self, x: Tensor, axis: int | None = None) -> Tensor:
        """The rows of `x` that carry tangents; a view where `outer` is 1."""
        axis = self.axis if axis is None else axis
        if self.active == self.batch:
            return x
        if self.outer == 1:
            return x.narrow(axis, 0, self.kept)
        parts = x.unflatten(axis, (self.outer, self.batch, self.inner))
        return parts.narrow(axis + 1, 0, self.active).flatten(axis, axis + 2)

    def shape(self, shape: Sequence[int]) -> list[int]:
        """The tangent's shape for a primal of `shape`."""
        shape = list(shape)
        shape[self.axis] = self.kept
        return shape

    def fit(self, tangent: Sequence[int], primal: Sequence[int]) -> bool:
        """Whether these are the shapes of a tangent and its primal."""
        return len(primal) > self.axis and primal[self.axis] == self.size and list(tangent) == self.shape(primal)

    def fill(self, x_dot: Tensor) -> Tensor:
        """The tangent of every row: zero where there was none."""
        if self.active == self.batch:
            return x_dot
        parts = x_dot.unflatten(self.axis, (self.outer, self.active, self.inner))
        shape = list(parts.shape)
        shape[self.axis + 1] = self.batch - self.active
        return torch.cat([parts, parts.new_zeros(shape)], self.axis + 1).flatten(self.axis, self.axis + 2)

    def reshaped(self, old: Sequence[int], new: Sequence[int]) -> Rows:
        """Where the batch is after a reshape.

        Raises:
            Untracked: one of the new dimensions cuts through the batch.
        """
        if self.axis == 0 < len(new) and new[0] == old[0]:
            return self
        stride = self.inner * math.prod(old[self.axis + 1 :])  # of the batch, in elements
        if stride == 0:
            raise Untracked("reshape")
        below = 1
        for axis in range(len(new) - 1, -1, -1):
            above = below * new[axis]
            if above > stride:  # the batch begins in this dimension
                if stride % below == 0 and above % (stride * self.batch) == 0:
                    return Rows(axis, above // (stride * self.batch), self.batch, stride // below, self.active)
                break
            below = above
        raise Untracked("reshape")
