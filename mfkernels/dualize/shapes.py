"""Rules of operations that move values and change none: shapes, joins and splits, indexing, writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .call import Call, Out, Slot, has_tangent, tangent
from .rows import Rows, Untracked


def unknown(call: Call, out: Any) -> list[Out]:
    """Any function: the tangent of all rows through jvp."""
    if any(slot.rows is not None for slot in call.slots()):
        raise Untracked(call.name)
    return [Out(t, None) for t in call.jvp()]


def broadcast(t: Tensor, out: Tensor, from_right: int, rows: Rows | None) -> Out:
    if rows is None:
        return Out(t if t.shape == out.shape else t.expand(out.shape), None)
    if out.ndim < from_right or out.shape[-from_right] != rows.size:
        raise Untracked("broadcast")
    rows = rows.at(out.ndim - from_right)
    shape = rows.shape(out.shape)
    return Out(t if list(t.shape) == shape else t.expand(shape), rows)


# ---------------------------------------------------------------------------------------------------------------- shape


def reshape(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    if not isinstance(x, Slot) or isinstance(call.arg(1, "dtype"), torch.dtype):
        return unknown(call, out)
    if x.rows is None:
        return [Out(x.tangent.reshape(out.shape), None)]
    rows = x.rows.reshaped(x.shape, out.shape)
    return [Out(x.tangent.reshape(rows.shape(out.shape)), rows)]


def permute(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    t = call.func(x.tangent, *call.args[1:], **call.kwargs)
    if x.rows is None:
        return [Out(t, None)]
    labelled = torch.empty(tuple(range(1, x.ndim + 1)), device="meta")  # each size names its dimension
    where = call.func(labelled, *call.args[1:], **call.kwargs).shape
    return [Out(t, x.rows.at(list(where).index(x.rows.axis + 1)))]


def expand(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    if not isinstance(x, Slot):
        return [Out(None, None)]
    return [broadcast(x.tangent, out, 0 if x.rows is None else x.ndim - x.rows.axis, x.rows)]


def broadcast_tensors(call: Call, out: Sequence[Tensor]) -> list[Out]:
    operands = list(call.operands())
    return [
        broadcast(x.tangent, o, 0 if x.rows is None else x.ndim - x.rows.axis, x.rows)
        if isinstance(x, Slot)
        else Out(None, None)
        for x, o in zip(operands, out, strict=True)
        if has_tangent(o)
    ]


def repeat(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    t = call.func(x.tangent, *call.args[1:], **call.kwargs)
    if x.rows is None:
        return [Out(t, None)]
    axis = x.rows.axis + out.ndim - x.ndim
    times = out.shape[axis] // x.rows.size
    return [Out(t, Rows(axis, x.rows.outer * times, x.rows.batch, x.rows.inner, x.rows.active))]


def repeat_interleave(call: Call, out: Tensor) -> list[Out]:
    x, n, dim = call.args[0], call.arg(1, "repeats"), call.arg(2, "dim")
    if x.rows is None:
        return unknown(call, out)
    if dim is None:
        raise Untracked(call.name)
    rows = x.rows
    if dim % x.ndim == rows.axis:
        if not isinstance(n, int):
            raise Untracked(call.name)
        rows = Rows(rows.axis, rows.outer, rows.batch, rows.inner * n, rows.active)
    kwargs = {k: v for k, v in call.kwargs.items() if k != "output_size"}  # that is the primal's
    return [Out(call.func(x.tangent, *call.args[1:], **kwargs), rows)]


def split(call: Call, out: Sequence[Tensor]) -> list[Out]:
    x = call.args[0]
    default = call.kwargs.get("dim", 0)
    dim = (call.args[1] if len(call.args) > 1 else default) if call.name == "unbind" else call.arg(2, "dim", 0)
    rows = x.rows
    if rows is not None:
        if dim % x.ndim == rows.axis:
            raise Untracked(call.name)
        if call.name == "unbind" and dim % x.ndim < rows.axis:
            rows = rows.at(rows.axis - 1)
    return [Out(t, rows) for t in call.func(x.tangent, *call.args[1:], **call.kwargs)]


def join(call: Call, out: Tensor) -> list[Out]:
    """cat and stack."""
    parts = list(call.arg(0, "tensors"))
    dim = call.arg(1, "dim", call.kwargs.get("axis", 0)) % out.ndim
    stacked = call.name == "stack"
    slots = [x for x in parts if isinstance(x, Slot)]
    rows = slots[0].rows
    if not stacked and rows is not None and dim == rows.axis:
        return [_join_batches(call, slots, len(parts), dim)]
    if any(x.rows != rows for x in slots):
        raise Untracked(call.name)

    def part(x: Any) -> Tensor:
        if isinstance(x, Slot):
            return x.tangent.to(out.dtype)
        if rows is not None and (x.ndim <= rows.axis or x.shape[rows.axis] != rows.size):
            raise Untracked(call.name)
        return x.new_zeros(x.shape if rows is None else rows.shape(x.shape), dtype=out.dtype)

    t = (torch.stack if stacked else torch.cat)([part(x) for x in parts], dim)
    if rows is None:
        return [Out(t, None)]
    return [Out(t, rows.at(rows.axis + 1) if stacked and dim <= rows.axis else rows)]


def _join_batches(call: Call, slots: list[Slot], parts: int, dim: int) -> Out:
    """Batches one after the other, as guidance has them: their number is `outer`."""
    rows = [x.rows for x in slots if x.rows is not None]
    like = {(r.axis, r.batch, r.inner, r.active) for r in rows}
    if len(rows) < parts or len(like) > 1:
        raise Untracked(call.name)
    outer = sum(r.outer for r in rows)
    return Out(torch.cat([x.tangent for x in slots], dim), replace(rows[0], outer=outer))


# ------------------------------------------------------------------------------------------------------------- indexing


class Index:
    """An index applied to a tensor of `shape`: which dimensions pass through it whole, and where they end up."""

    def __init__(self, index: Any, shape: Sequence[int]) -> None:
        items = list(index) if isinstance(index, tuple) else [index]
        items = [torch.as_tensor(x) if isinstance(x, list) else x for x in items]
        items = [x.item() if isinstance(x, np.generic) else x for x in items]
        used = sum(self._consumes(x) for x in items)
        dots = [i for i, x in enumerate(items) if x is Ellipsis]
        fill = [slice(None)] * (len(shape) - used)
        if dots:
            items[dots[0] : dots[0] + 1] = fill
        else:
            items += fill
        self.items: list[Any] = items
        self.position: dict[int, int] = {}  # dimension: position in `items` of the slice on it
        dim = 0
        for i, x in enumerate(items):
            if isinstance(x, slice):
                self.position[dim] = i
            dim += self._consumes(x)
        self._place()

    @staticmethod
    def _consumes(x: Any) -> int:
        if x is None or x is Ellipsis or isinstance(x, bool):
            return 0
        return x.ndim if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) else 1

    def _place(self) -> None:
        """Where each slice's dimension ends up: integers vanish, tensors share one block of dimensions."""
        self.target: dict[int, int] = {}  # position in `items`: dimension of the result
        kept = [i for i, x in enumerate(self.items) if isinstance(x, bool) or not isinstance(x, int)]
        block = [j for j, i in enumerate(kept) if isinstance(self.items[i], (Tensor, bool))]
        depth = max(
            (
                1
                if getattr(self.items[kept[j]], "dtype", torch.bool) in (torch.bool, torch.uint8)
                else self.items[kept[j]].ndim
                for j in block
            ),
            default=0,
        )
        adjacent = not block or block[-1] - block[0] + 1 == len(block)
        first = block[0] if block and adjacent else 0
        out = depth if block and not adjacent else 0
        for j, i in enumerate(kept):
            if block and adjacent and j == first:
                out += depth
            if j not in block:
                self.target[i] = out
                out += 1
        self.ndim = out


def getitem(call: Call, out: Tensor) -> list[Out]:
    x, index = call.args
    if not isinstance(x, Slot) or any(isinstance(i, Slot) for i in (index if isinstance(index, tuple) else (index,))):
        raise NotImplementedError("an index cannot carry a tangent")
    if x.rows is None:
        return [Out(x.tangent[index], None)]
    at = Index(index, x.shape)
    rows = x.rows
    if rows.axis not in at.position:
        raise Untracked(call.name)
    i = at.position[rows.axis]
    start, stop, step = at.items[i].indices(rows.size)
    axis = at.target[i]
    if (start, stop, step) == (0, rows.size, 1):
        at.items[i] = slice(None)
        return [Out(x.tangent[tuple(at.items)], rows.at(axis))]
    if rows.outer != 1 or rows.inner != 1 or step != 1:
        raise Untracked(call.name)
    return [_cut(x.tangent, at.items, i, start, stop, axis, rows)]


def _cut(x_dot: Tensor, items: list[Any], i: int, start: int, stop: int, axis: int, rows: Rows) -> Out:
    """Samples start … stop of the batch."""
    batch, active = max(stop - start, 0), max(min(rows.active, stop) - start, 0)
    if active == 0:
        return Out(None, None)
    items[i] = slice(start, start + active)
    return Out(x_dot[tuple(items)], None if batch == 1 else Rows(axis, 1, batch, 1, active))


def select(call: Call, out: Tensor) -> list[Out]:
    x, dim = call.args[0], call.arg(1, "dim")
    if x.rows is not None and dim % x.ndim == x.rows.axis:
        raise Untracked(call.name)
    rows = x.rows and x.rows.at(x.rows.axis - (dim % x.ndim < x.rows.axis))
    return [Out(call.func(x.tangent, *call.args[1:], **call.kwargs), rows)]


def narrow(call: Call, out: Tensor) -> list[Out]:
    x, dim, start, length = call.args[0], call.arg(1, "dim"), call.arg(2, "start"), call.arg(3, "length")
    if x.rows is None or dim % x.ndim != x.rows.axis:
        return [Out(call.func(x.tangent, *call.args[1:], **call.kwargs), x.rows)]
    if x.rows.outer != 1 or x.rows.inner != 1 or not isinstance(start, int):
        raise Untracked(call.name)
    items: list[Any] = [slice(None)] * x.ndim
    start %= x.rows.size
    return [_cut(x.tangent, items, x.rows.axis, start, start + length, x.rows.axis, x.rows)]


def index_select(call: Call, out: Tensor) -> list[Out]:
    x, dim = call.args[0], call.arg(1, "dim")
    if not isinstance(x, Slot) or (x.rows is not None and dim % x.ndim == x.rows.axis):
        raise Untracked(call.name)
    return [Out(call.func(x.tangent, *call.args[1:], **call.kwargs), x.rows)]


def aligned(call: Call, out: Tensor) -> list[Out]:
    """gather, scatter …: operands of one rank, of which sample i takes the rows i."""
    dim = call.arg(2, "dim") if call.name == "take_along_dim" else call.arg(1, "dim")
    slots = call.slots()
    rows = slots[0].rows
    if rows is None:
        return unknown(call, out)
    plain = [x for x in call.operands() if isinstance(x, Tensor) and x.ndim > 0]
    if (
        not isinstance(dim, int)
        or dim % slots[0].ndim == rows.axis
        or any(x.rows != rows for x in slots)
        or any(x.ndim != slots[0].ndim or x.shape[rows.axis] != rows.size for x in plain)
    ):
        raise Untracked(call.name)
    tangents = call.sliced(slots[0].ndim - rows.axis, rows).jvp()
    call.through_jvp = True
    return [Out(tangents[0], rows)]


def setitem(call: Call, out: Tensor) -> list[Out]:
    x, index, value = call.args
    if any(isinstance(i, Slot) for i in (index if isinstance(index, tuple) else (index,))):
        raise NotImplementedError("an index cannot carry a tangent")
    at = Index(index, x.shape)
    rows = _rows_of_target(x, value, at)
    v_dot = tangent(value)
    if rows is None:
        x_dot = x.tangent.clone() if isinstance(x, Slot) else torch.zeros_like(x)
        x_dot[index] = 0 if v_dot is None else v_dot.to(x_dot.dtype)
        return [Out(x_dot, None)]
    x_dot = x.tangent.clone() if isinstance(x, Slot) else x.new_zeros(rows.shape(x.shape))
    at.items[at.position[rows.axis]] = slice(None)
    x_dot[tuple(at.items)] = 0 if v_dot is None else v_dot.to(x_dot.dtype)
    return [Out(x_dot, rows)]


def _rows_of_target(x: Any, value: Any, at: Index) -> Rows | None:
    """The rows of `x` in x[index] = value."""
    if all(slot.rows is None for slot in (x, value) if isinstance(slot, Slot)):
        return None
    if isinstance(x, Slot):
        rows = x.rows
    else:  # a plain tensor: its batch is where the value's goes
        axis = at.ndim - (value.ndim - value.rows.axis)
        found = [d for d, i in at.position.items() if at.target[i] == axis]
        if not found:
            raise Untracked("setitem")
        rows = value.rows.at(found[0])
    if rows is None or rows.axis not in at.position:
        raise Untracked("setitem")
    if x.shape[rows.axis] != rows.size:
        raise Untracked("setitem")
    i = at.position[rows.axis]
    if at.items[i].indices(rows.size) != (0, rows.size, 1):
        raise Untracked("setitem")
    if isinstance(value, Slot) and (
        value.rows is None or value.rows.at(0) != rows.at(0) or value.ndim - value.rows.axis != at.ndim - at.target[i]
    ):
        raise Untracked("setitem")
    return rows


def copy_(call: Call, out: Tensor) -> list[Out]:
    x, value = call.args[:2]
    if not isinstance(value, Slot):
        return [Out(torch.zeros_like(x.tangent), x.rows)]
    from_right = 0 if value.rows is None else value.ndim - value.rows.axis
    got = broadcast(value.tangent, out, from_right, value.rows)
    return [Out(got.tangent.to(out.dtype, copy=True), got.rows)]  # type: ignore[union-attr]


def fill_(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    if len(call.slots()) != 1 or not isinstance(x, Slot):
        return unknown(call, out)
    return [Out(torch.zeros_like(x.tangent), x.rows)]
