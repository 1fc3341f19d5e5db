"""Rules of operators that move values without changing them: shapes, slices, joins, indexing, copies.

The tangent of a view need not be a view: writes are handled by `memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .call import Call, Out, Rows, Slot, Untracked


def broadcast(t: Tensor, out: Tensor, from_right: int, rows: Rows | None) -> Out:
    """The tangent `t`, of the operands' shape, expanded to the shape of `out`."""
    if rows is None:
        return Out(t if t.shape == out.shape else t.expand(out.shape))
    if out.ndim < from_right or out.shape[-from_right] != rows.size:
        raise Untracked("broadcast")
    rows = rows.at(out.ndim - from_right)
    shape = rows.shape(out.shape)
    return Out(t if list(t.shape) == shape else t.expand(shape), rows)


def same(call: Call, out: Any) -> list[Out]:
    """A linear operator that does not move the batch."""
    x = call.args[0]
    return [Out(call.func(x.tangent, *call.args[1:], **call.kwargs), x.rows)]


def copied(call: Call, out: Tensor) -> list[Out]:
    """_conj, _neg_view: as copies, since the conjugate and negative bits are not resolved below autograd."""
    x = call.args[0]
    return [Out(call.func(x.tangent).resolve_conj().resolve_neg(), x.rows)]


# ---------------------------------------------------------------------------------------------------------------- shape


def reshape(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    if isinstance(call.args[1], torch.dtype):
        raise NotImplementedError("forward AD of the same bits as another dtype")
    if x.rows is None:
        return [Out(x.tangent.reshape(out.shape))]
    rows = x.rows.reshaped(x.shape, out.shape)
    return [Out(x.tangent.reshape(rows.shape(out.shape)), rows)]


def expand(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    return [broadcast(x.tangent, out, x.from_right, x.rows)]


def repeat(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    t = x.tangent.repeat(call.args[1])
    if x.rows is None:
        return [Out(t)]
    axis = x.rows.axis + out.ndim - x.ndim
    times = out.shape[axis] // x.rows.size
    return [Out(t, Rows(axis, x.rows.outer * times, x.rows.batch, x.rows.inner, x.rows.active))]


# ------------------------------------------------------------------------------------------------- parts and their sums


def part(call: Call, out: Any) -> list[Out]:
    """permute, select, slice, split, diagonal …: views that move, drop or cut dimensions.

    They are linear: the tangent is the operator's result on the tangent. Where the batch is in it is found by running
    the operator on a meta tensor in which each dimension can be told by its stride.
    """
    x, rows = call.args[0], call.args[0].rows
    if rows is not None:
        places = _places(call, x.shape, rows.axis)
        if any(size != rows.size for _, _, size in places):
            return [_cut(call, x, *place) for place in places]
    made = call.func(x.tangent, *call.args[1:], **call.kwargs)
    made = made if isinstance(made, (list, tuple)) else [made]
    return [Out(t, rows and rows.at(places[i][0])) for i, t in enumerate(made)]


def _places(call: Call, shape: Sequence[int], axis: int) -> list[tuple[int, int, int]]:
    """For each output: where dimension `axis` is (-1: nowhere), its first element there and their number."""
    hashable = tuple(tuple(a) if isinstance(a, list) else a for a in call.args[1:])
    try:
        return _probe(call.func, tuple(shape), axis, hashable, tuple(call.kwargs.items()))
    except TypeError:  # symbolic sizes are not hashable
        return _probe.__wrapped__(call.func, tuple(shape), axis, hashable, tuple(call.kwargs.items()))


@lru_cache(maxsize=4096)
def _probe(func: Any, shape: tuple[int, ...], axis: int, args: Any, kwargs: Any) -> list[tuple[int, int, int]]:
    strides = [1000033] * len(shape)
    strides[axis] = 1000003  # another prime: no sum or multiple of the other strides
    made = func(torch.empty_strided(shape, strides, device="meta"), *args, **dict(kwargs))
    places = []
    for o in made if isinstance(made, (list, tuple)) else [made]:
        at = o.stride().index(strides[axis]) if strides[axis] in o.stride() else -1
        places.append((at, o.storage_offset() // strides[axis], 1 if at < 0 else o.shape[at]))
    return places


def _cut(call: Call, x: Slot, at: int, start: int, size: int) -> Out:
    """Elements start … start + size of the batch's dimension."""
    rows = x.rows
    assert rows is not None
    axis, stop = rows.axis, start + size
    if at < 0 and call.name not in ("select", "unbind"):
        raise Untracked(call.name)
    whole = rows.batch * rows.inner
    if start % whole == 0 and stop % whole == 0:  # some of several batches that lie one after the other
        outer, kept = size // whole, rows.active * rows.inner
        return Out(x.tangent.narrow(axis, start // whole * kept, outer * kept), rows._replace(outer=outer))
    if rows.outer != 1 or start % rows.inner or stop % rows.inner:
        raise Untracked(call.name)
    batch = size // rows.inner
    active = min(rows.active - start // rows.inner, batch)
    if active <= 0:
        return Out(None)
    t = x.tangent.narrow(axis, start, active * rows.inner)
    t = t.squeeze(axis) if at < 0 else t
    if batch == 1:
        return Out(t, None, start // rows.inner)
    return Out(t, Rows(axis, 1, batch, rows.inner, active))


def join(call: Call, out: Tensor) -> list[Out]:
    """cat and stack."""
    stacked, dim = call.name == "stack", call.arg(1, "dim", 0) % out.ndim
    # cat ignores a one-dimensional empty tensor
    parts = [x for x in call.args[0] if stacked or x.ndim == out.ndim]
    slots = call.slots()
    rows = slots[0].rows
    if not stacked and rows is not None and dim == rows.axis:
        # several batches, as in guidance: their number is `outer`
        outer = [x.rows.outer for x in slots if x.rows is not None and x.rows._replace(outer=rows.outer) == rows]
        if len(outer) < len(parts):
            raise Untracked(call.name)
        return [Out(torch.cat([x.tangent for x in slots], dim), rows._replace(outer=sum(outer)))]

    plain = [x for x in parts if isinstance(x, Tensor)]
    if any(x.rows != rows for x in slots) or (rows and any(x.shape[rows.axis :][:1] != (rows.size,) for x in plain)):
        raise Untracked(call.name)

    def part(x: Any) -> Tensor:
        if isinstance(x, Slot):
            return x.tangent.to(out.dtype)
        return x.new_zeros(x.shape if rows is None else rows.shape(x.shape), dtype=out.dtype)

    t = (torch.stack if stacked else torch.cat)([part(x) for x in parts], dim)
    return [Out(t, rows.at(rows.axis + 1) if rows is not None and stacked and dim <= rows.axis else rows)]


# ------------------------------------------------------------------------------------------------------------- indexing


def _moved(x: Slot, indices: Sequence[Any]) -> Rows | None:
    """Where the batch is in x[indices], which holds a tensor or None for each of the first dimensions.

    Raises:
        Untracked: an index picks samples.
    """
    rows = x.rows
    if rows is None:
        return None
    taken = {d for d, i in enumerate(indices) if i is not None}
    if rows.axis in taken or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        raise Untracked("index")
    depth = max((i.ndim for i in indices if i is not None), default=0)
    together = sorted(taken) == list(range(min(taken), max(taken) + 1)) if taken else True
    first = min(taken) if together and taken else 0  # where the dimensions of the indices end up
    before = sum(d not in taken for d in range(rows.axis))
    return rows.at(before + (depth if before >= first or not together else 0))


def index(call: Call, out: Tensor) -> list[Out]:
    x, indices = call.args
    rows = _moved(x, indices)
    return [Out(call.func(x.tangent, indices), rows)]


def index_put(call: Call, out: Tensor) -> list[Out]:
    (x, indices, value), accumulate = call.args[:3], call.arg(3, "accumulate", False)
    rows = x.rows if isinstance(x, Slot) else None
    if isinstance(value, Slot) and (value.rows or ())[1:] != (rows or ())[1:]:
        raise Untracked(call.name)
    at = _moved(x, indices) if isinstance(x, Slot) else None
    if at is not None and isinstance(value, Slot):
        given = [i.ndim for i in indices if i is not None]
        if value.from_right != out.ndim - len(given) + max(given) - at.axis:
            raise Untracked(call.name)
    x_dot = x.tangent if isinstance(x, Slot) else torch.zeros_like(out)
    v_dot = value.tangent if isinstance(value, Slot) else out.new_zeros(())
    return [Out(torch.ops.aten.index_put(x_dot, indices, v_dot.to(x_dot.dtype), accumulate), rows)]


def index_select(call: Call, out: Tensor) -> list[Out]:
    x, dim = call.args[0], call.args[1]
    if x.rows is not None and dim % x.ndim == x.rows.axis:
        raise Untracked(call.name)
    return same(call, out)


def aligned(call: Call, out: Tensor) -> list[Out]:
    """gather, scatter …: operands with the same number of dimensions and the batch in the same one."""
    if call.name == "scatter_reduce" and call.arg(4, "reduce") == "prod":
        raise NotImplementedError("forward AD of scatter_reduce's products is wrong in PyTorch")
    dim, first = call.args[1], call.slots()[0]
    rows, ndim = first.rows, first.ndim
    if rows is None:
        return by_jvp(call, out)
    others = [x for x in call.operands() if x.ndim > 0]
    if dim % ndim == rows.axis or any(x.ndim != ndim or x.shape[rows.axis] != rows.size for x in others):
        raise Untracked(call.name)
    return [Out(call.on_rows()[0].jvp()[0], rows)]


def overwrite(call: Call, out: Tensor) -> list[Out]:
    """copy_(x, value), fill_(x, value), zero_(x)."""
    value = call.arg(1, "value")
    if not isinstance(value, Slot):
        return [Out(None)]
    return [broadcast(value.tangent.to(out.dtype), out, value.from_right, value.rows)]


# ------------------------------------------------------------------------------------------------------------- the rest


def by_jvp(call: Call, out: Any) -> list[Out]:
    """Any operator: tangents of all rows by `torch.func.jvp`."""
    if any(slot.rows is not None for slot in call.slots()):
        raise Untracked(call.name)
    return [Out(t) for t in call.jvp()]


TABLE = {
    reshape: "view _unsafe_view _reshape_alias",
    same: "clone _to_copy alias lift_fresh resolve_conj resolve_neg",
    copied: "_conj _neg_view",
    join: "cat stack",
    aligned: "gather scatter scatter_add scatter_reduce",
    expand: "expand",
    repeat: "repeat",
    index: "index",
    index_put: "index_put",
    index_select: "index_select",
    overwrite: "copy fill zero",
}
