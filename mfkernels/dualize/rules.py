"""For each kind of operation: where the batch of its result is, and its tangent.

A rule takes the `Call` and the primal result (of an in-place operation: the tensor before it) and gives an `Out` for
each output. It raises `Untracked` where the rows that carry tangents are no prefix in the result, and `MixesRows` where
samples would depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..attention import attention
from ..dual import Dual, tangent_of
from ..rms_norm import rms_norm
from . import fast, names
from .call import Call, Out, Slot, has_tangent, primal, tangent
from .rows import MixesRows, Rows, Untracked
from .shapes import (
    aligned,
    broadcast,
    broadcast_tensors,
    copy_,
    expand,
    fill_,
    getitem,
    index_select,
    join,
    narrow,
    permute,
    repeat,
    repeat_interleave,
    reshape,
    select,
    setitem,
    split,
    unknown,
)


def rule_for(call: Call) -> Callable[[Call, Any], list[Out]]:
    name = call.name
    if name in _RULES:
        return _RULES[name]
    bare = name.removesuffix("_")
    if name in ("max", "min") and isinstance(call.arg(1, "other"), (Tensor, Slot)):
        return elementwise
    if bare in names.ELEMENTWISE:
        return elementwise
    if name in names.ALONG:
        return along
    if name in names.BATCH_FIRST:
        return batch_first
    if name in names.RESHAPE:
        return reshape
    if name in names.PERMUTE:
        return permute
    if name in names.CAST:
        return cast
    if name in names.SPLIT:
        return split
    return unknown


# ---------------------------------------------------------------------------------------------------------- elementwise


def elementwise(call: Call, out: Tensor) -> list[Out]:
    from_right, rows = call.rows_from_right()
    inner = call.sliced(from_right, rows)
    quick = fast.ELEMENTWISE.get(call.name.removesuffix("_"))
    t: Tensor | None = None
    holomorphic = call.name.removesuffix("_") in ("add", "sub", "rsub", "mul", "neg")
    if quick is not None and (holomorphic or not any(slot.primal.is_complex() for slot in call.slots())):
        try:
            t = quick(*inner.args, **inner.kwargs)
        except (
            TypeError,
            AttributeError,
        ):  # a signature that the written rule does not know (rounding_mode=, a dual mask)
            t = None
    if t is None:
        (t,) = inner.jvp()
        call.through_jvp = True
    return [broadcast(t, out, from_right, rows)]


def power(call: Call, out: Tensor) -> list[Out]:
    x, n = call.args[0], call.arg(1, "exponent")
    if not isinstance(x, Slot) or not isinstance(n, (int, float)) or isinstance(n, bool) or x.primal.is_complex():
        return elementwise(call, out)
    p = x.rows.take(x.primal) if x.rows else x.primal
    t = torch.zeros_like(x.tangent) if n == 0 else x.tangent * (n * p ** (n - 1))
    return [Out(t, x.rows)]


def cast(call: Call, out: Tensor) -> list[Out]:
    x = call.args[0]
    if not isinstance(x, Slot):
        return [Out(None, None)]
    args = [primal(a) for a in call.args[1:]]
    return [Out(call.func(x.tangent, *args, **{k: primal(v) for k, v in call.kwargs.items()}), x.rows)]


def constant(call: Call, out: Any) -> list[Out]:
    return [Out(None, None) for leaf in tree_leaves(out) if has_tangent(leaf)]


# ----------------------------------------------------------------------------------------------------- along dimensions


_ALL_FOR_NONE = frozenset(["sum", "nansum", "mean", "nanmean", "var", "std", "var_mean", "std_mean", "amax", "amin"])


def _dims(call: Call, ndim: int) -> list[int]:
    position, keyword, default = names.ALONG[call.name]
    dim = call.arg(position, keyword, call.kwargs.get("axis", default))
    if call.name in ("softmax", "log_softmax", "softmin") and dim is None:
        raise MixesRows("without dim=")
    if dim is None or isinstance(dim, bool) or (call.name in _ALL_FOR_NONE and dim in ((), [])):
        return list(range(ndim))  # a flag is var's `unbiased`, which has no dimensions beside it
    if not isinstance(dim, (int, tuple, list)):
        raise Untracked(call.name)
    return [d % ndim for d in ((dim,) if isinstance(dim, int) else dim)] if ndim else []


def along(call: Call, out: Any) -> list[Out]:
    x = call.args[0] if call.args else call.kwargs.get("input")
    if not isinstance(x, Slot) or len(call.slots()) != 1 or sum(1 for _ in call.operands()) != 1:
        return unknown(call, out)  # diff(prepend=) …
    dims = _dims(call, x.ndim)
    if x.rows is not None and x.rows.axis in dims:
        raise MixesRows(f"dimension {x.rows.axis} of {tuple(x.shape)} is the batch's")
    inner = call.only(x, x.rows)
    outs = [leaf for leaf in tree_leaves(out) if has_tangent(leaf)]
    if call.name == "softmax" and isinstance(call.args[0], Slot):
        o = outs[0]
        tangents: Sequence[Tensor] = [fast.softmax(x, dims[0], x.rows.take(o.detach()) if x.rows else o.detach())]
    elif (
        call.name in ("sum", "mean", "flip", "roll", "cumsum", "diff", "unfold", "tril", "triu")
        or call.name[:7] == "view_as"
    ):
        tangents = [call.func(*(x.tangent if a is x else a for a in call.args), **call.kwargs)]
    else:
        tangents = inner.jvp()
        call.through_jvp = True
    result = []
    for leaf, t in zip(outs, tangents, strict=True):
        rows = x.rows
        if rows is not None and leaf.ndim < x.ndim:  # without keepdim
            rows = rows.at(rows.axis - sum(d < rows.axis for d in dims))
        result.append(Out(t, rows))
    return result


# --------------------------------------------------------------------------------------------------------- contractions


def matmul(call: Call, out: Tensor) -> list[Out]:
    a, b = call.args[0], call.arg(1, "other", call.kwargs.get("mat2", call.kwargs.get("vec")))
    if call.name == "rmatmul":
        a, b = b, a
    slots = [x for x in (a, b) if isinstance(x, Slot)]
    rows = slots[0].rows
    axes = [_matmul_axis(x is a, x, out, b.ndim) for x in slots] if rows is not None else []
    if len(slots) == 2 and (slots[1].rows is None) != (rows is None):
        raise Untracked(call.name)
    if rows is not None:
        batched = axes[0] < out.ndim - 2 and slots[0].ndim > 2
        # both carry the batch: only as a dimension of the batch of products
        if len(slots) == 2 and (axes[0] != axes[1] or slots[1].rows.at(0) != rows.at(0) or not batched):  # type: ignore[union-attr]
            raise Untracked(call.name)
        if not batched:
            small_a, small_b = (rows.take(x.primal) if isinstance(x, Slot) else x for x in (a, b))
        else:
            k = slots[0].ndim - rows.axis
            small_a, small_b = (
                rows.take(primal(x), x.ndim - k) if x.ndim >= k and x.shape[-k] == rows.size else primal(x)
                for x in (a, b)
            )
    else:
        small_a, small_b = primal(a), primal(b)
    t = None
    if tangent(a) is not None:
        t = torch.matmul(a.tangent, small_b)
    if tangent(b) is not None:
        second = torch.matmul(small_a, b.tangent)
        t = second if t is None else t + second
    assert t is not None
    return [Out(t, rows and rows.at(axes[0]))]


def _matmul_axis(is_left: bool, x: Slot, out: Tensor, right_ndim: int) -> int:
    """The dimension of the product in which the batch of one factor is."""
    assert x.rows is not None
    from_right = x.ndim - x.rows.axis
    if x.ndim == 1 or from_right == (1 if is_left else 2):
        raise MixesRows(f"dimension {x.rows.axis} of {tuple(x.shape)} is the batch's, and it is summed over")
    lost = int(is_left and right_ndim == 1)  # a vector on the right leaves no column dimension
    return out.ndim + lost - from_right


def addmm(call: Call, out: Tensor) -> list[Out]:
    """addmm and baddbmm: an addition and a product."""
    c, a, b = call.args[0], call.args[1], call.args[2]
    alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    parts = []
    if isinstance(a, Slot) or isinstance(b, Slot):
        (product,) = matmul(Call(torch.matmul, "matmul", (a, b), {}), out)
        assert product.tangent is not None
        parts.append(Out(product.tangent * alpha, product.rows))
    if isinstance(c, Slot):
        from_right = 0 if c.rows is None else c.ndim - c.rows.axis
        parts.append(broadcast(c.tangent * beta, out, from_right, c.rows))
    if any(p.rows != parts[0].rows for p in parts):
        raise Untracked(call.name)
    t = parts[0].tangent if len(parts) == 1 else parts[0].tangent + parts[1].tangent  # type: ignore[operator]
    return [Out(t, parts[0].rows)]


def outer(call: Call, out: Tensor) -> list[Out]:
    """Of a vector over the batch, such as the times, and a plain one."""
    x, y = call.args[0], call.arg(1, "vec2")
    if not isinstance(x, Slot) or isinstance(y, Slot):
        return unknown(call, out)
    return [Out(torch.outer(x.tangent, y), x.rows)]


def linear(call: Call, out: Tensor) -> list[Out]:
    x = call.arg(0, "input")
    if not isinstance(x, Slot) or len(call.slots()) != 1:
        return unknown(call, out)  # weights that depend on the sample
    if x.rows is not None and x.rows.axis == x.ndim - 1:
        raise MixesRows("the last dimension is the batch's, and it is summed over")
    return [Out(F.linear(x.tangent, call.arg(1, "weight")), x.rows)]


def einsum(call: Call, out: Tensor) -> list[Out]:
    equation = call.args[0]
    operands = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], (list, tuple)) else call.args[1:]
    if not isinstance(equation, str):
        return unknown(call, out)
    terms, result = _einsum_terms(equation, [x.ndim for x in operands])
    slots = [(i, x) for i, x in enumerate(operands) if isinstance(x, Slot)]
    rows = slots[0][1].rows
    if any((x.rows is None) != (rows is None) for _, x in slots):
        raise Untracked(call.name)
    small = [primal(x) for x in operands]
    if rows is not None:
        letters = {terms[i][x.rows.axis] for i, x in slots}  # type: ignore[union-attr]
        (letter, *more) = letters
        if more or any(x.rows.at(0) != rows.at(0) for _, x in slots):  # type: ignore[union-attr]
            raise Untracked(call.name)
        if letter not in result:
            raise MixesRows(f"{equation!r} sums over {letter}, which is the batch's")
        for i, x in enumerate(small):
            if letter in terms[i] and x.shape[terms[i].index(letter)] == rows.size:
                small[i] = rows.take(x, terms[i].index(letter))
    lowered = ",".join(terms) + "->" + result
    t = None
    for i, x in slots:
        one = torch.einsum(lowered, *small[:i], x.tangent, *small[i + 1 :])
        t = one if t is None else t + one
    assert t is not None
    return [Out(t, rows and rows.at(result.index(letter)))]


def _einsum_terms(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """Operands' and result's letters, ellipses replaced by letters that are not in use."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if c not in equation]
    depth = max([n - (len(t) - 3) for t, n in zip(terms, ndims, strict=True) if "..." in t], default=0)
    dots = "".join(free[:depth])
    terms = [
        t.replace("...", dots[depth - (n - len(t) + 3) :] if n > len(t) - 3 else "")
        for t, n in zip(terms, ndims, strict=True)
    ]
    if not arrow:
        letters = "".join(t for t in left.replace("...", "") if t != ",")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return terms, right.replace("...", dots)


# ---------------------------------------------------------------------------------------------------------------- norms


def layer_norm(call: Call, out: Tensor) -> list[Out]:
    x, shape = call.args[0], call.arg(1, "normalized_shape")
    if not isinstance(x, Slot) or len(call.slots()) != 1:
        return unknown(call, out)
    depth = 1 if isinstance(shape, int) else len(shape)
    if x.rows is not None and x.rows.axis >= x.ndim - depth:
        raise MixesRows(f"dimension {x.rows.axis} of {tuple(x.shape)} is the batch's, and it is normalised over")
    inner = call.only(x, x.rows)
    p = inner.args[0].primal.detach().to(out.dtype)
    small = Slot(p, x.tangent.to(out.dtype), None)
    weight = call.arg(2, "weight")
    if call.name == "layer_norm":
        t = fast.layer_norm(small, shape, weight, None, call.arg(4, "eps", 1e-5))
        return [Out(t, x.rows)]
    eps = call.arg(3, "eps")
    eps = torch.finfo(out.dtype).eps if eps is None else eps
    if depth != 1 or small.primal.ndim < 2:
        (t,) = inner.jvp()
        call.through_jvp = True
        return [Out(t, x.rows)]
    ones = p.new_ones(p.shape[-1]) if weight is None else weight
    return [Out(tangent_of(rms_norm(Dual(p, small.tangent), ones, eps=eps)), x.rows)]


def batch_norm(call: Call, out: Tensor) -> list[Out]:
    """In evaluation mode: an affine map of each channel."""
    first = 1 if call.func is F.batch_norm else 3  # torch.batch_norm has the weights first
    x, weight = call.args[0], call.arg(4 - first, "weight") if first == 3 else call.arg(3, "weight")
    var, eps = call.arg(first + 1, "running_var"), call.arg(7, "eps", 1e-5)
    if not isinstance(x, Slot) or (x.rows is not None and x.rows.axis == 1) or len(call.slots()) > 1:
        return unknown(call, out)
    factor = torch.rsqrt(var + eps)  # [C]
    factor = factor if weight is None else factor * weight
    return [Out(x.tangent * factor.view(-1, *[1] * (x.ndim - 2)), x.rows)]


def pad(call: Call, out: Tensor) -> list[Out]:
    x, amounts, mode = call.args[0], call.arg(1, "pad"), call.arg(2, "mode", "constant")
    rows = x.rows
    if rows is not None:
        i = x.ndim - 1 - rows.axis
        if 2 * i < len(amounts) and any(amounts[2 * i : 2 * i + 2]):
            raise Untracked(call.name)
    return [Out(F.pad(x.tangent, amounts, mode), rows)]


def constant_pad_nd(call: Call, out: Tensor) -> list[Out]:
    x, amounts = call.args[0], call.arg(1, "pad")
    return pad(Call(F.pad, "pad", (x, amounts), {}), out)


def group_norm(call: Call, out: Tensor) -> list[Out]:
    x, groups, weight = call.args[0], call.arg(1, "num_groups"), call.arg(2, "weight")
    if not isinstance(x, Slot) or len(call.slots()) > 1 or (x.rows is not None and x.rows.axis != 0):
        return batch_first(call, out)
    p = (x.primal if x.rows is None else x.rows.take(x.primal)).to(out.dtype)
    rows = (p.shape[0], groups, -1)  # a group is one row of a LayerNorm
    small = Slot(p.reshape(rows), x.tangent.to(out.dtype).reshape(rows), None)
    t = fast.layer_norm(small, small.shape[-1], None, None, call.arg(4, "eps", 1e-5)).reshape(p.shape)
    return [Out(t if weight is None else t * weight.view(-1, *[1] * (p.ndim - 2)), x.rows)]


_LINEAR_ON_IMAGES = (
    "avg_pool",
    "adaptive_avg",
    "interpolate",
    "upsample",
    "pixel",
    "channel_sh",
    "fold",
    "unfold",
    "im2",
)


def batch_first(call: Call, out: Any) -> list[Out]:
    slots = call.slots()
    x = slots[0]
    if x.rows is None or x.rows.axis != 0 or any(s.rows is None or s.rows != x.rows for s in slots):
        return unknown(call, out)
    if call.args[0] is not x or x.ndim < 3 or (len(slots) > 1 and call.name != "grid_sample"):
        return unknown(call, out)
    if call.name.startswith("conv"):
        args = list(call.args)
        args[0] = x.tangent
        if len(args) > 2:
            args[2] = None
        return [Out(call.func(*args, **{k: v for k, v in call.kwargs.items() if k != "bias"}), x.rows)]
    if call.name.startswith(_LINEAR_ON_IMAGES) and len(slots) == 1:
        return [Out(call.func(x.tangent, *call.args[1:], **call.kwargs), x.rows)]
    grid: Any = call.arg(1, "grid") if call.name == "grid_sample" else None
    rows: Rows = x.rows

    def cut(a: Any) -> Any:
        if isinstance(a, Slot):
            return Slot(rows.take(a.primal), a.tangent, None)
        return rows.take(a) if a is grid else a

    tangents = call.map(cut).jvp()
    call.through_jvp = True
    return [Out(t, rows) for t in tangents]


# ------------------------------------------------------------------------------------------------------------ attention


def scaled_dot_product_attention(call: Call, out: Tensor) -> list[Out]:
    q, k, v = (call.arg(i, name) for i, name in enumerate(("query", "key", "value")))
    mask, dropout_p = call.arg(3, "attn_mask"), call.arg(4, "dropout_p", 0.0)
    is_causal, scale = call.arg(5, "is_causal", False), call.kwargs.get("scale")
    from_right, rows = call.rows_from_right()
    if rows is not None and from_right < 3:
        raise MixesRows("a sequence dimension is the batch's")
    noise = call.noise if dropout_p > 0 else None
    small = call.sliced(from_right, rows)
    q, k, v = (small.arg(i, name) for i, name in enumerate(("query", "key", "value")))
    mask = small.arg(3, "attn_mask")
    grouped = q.ndim == 4 and k.shape[1] != q.shape[1]
    plain = all(x.ndim == 4 for x in (q, k, v)) and k.shape == v.shape and q.shape[0] == k.shape[0]
    if plain and mask is None and noise is None and q.shape[-1] == k.shape[-1] and (not grouped or k.shape[1] > 1):
        dq, dk, dv = (
            Dual(x.primal.transpose(1, 2), x.tangent.transpose(1, 2)) if isinstance(x, Slot) else x.transpose(1, 2)
            for x in (q, k, v)
        )
        o_dot = tangent_of(attention(dq, dk, dv, scale=scale, is_causal=is_causal)).transpose(1, 2)  # type: ignore[union-attr]
    else:
        if isinstance(noise, Tensor) and rows is not None:
            noise = rows.take(noise, noise.ndim - from_right)
        o_dot = fast.attention_with_mask(q, k, v, mask, is_causal, scale, noise)
    return [broadcast(o_dot, out, from_right, rows)]


_RULES: dict[str, Callable[[Call, Any], list[Out]]] = {
    "pow": power,
    "pow_": elementwise,
    "expand": expand,
    "expand_as": expand,
    "broadcast_tensors": broadcast_tensors,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "cat": join,
    "stack": join,
    "getitem": getitem,
    "setitem_": setitem,
    "copy_": copy_,
    "fill_": fill_,
    "zero_": fill_,
    "select": select,
    "narrow": narrow,
    "index_select": index_select,
    **dict.fromkeys(
        ["gather", "take_along_dim", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce"], aligned
    ),
    "matmul": matmul,
    "rmatmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "mv": matmul,
    "addmm": addmm,
    "baddbmm": addmm,
    "outer": outer,
    "ger": outer,
    "linear": linear,
    "einsum": einsum,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "batch_norm": batch_norm,
    "group_norm": group_norm,
    "pad": pad,
    "constant_pad_nd": constant_pad_nd,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    **dict.fromkeys(names.CONSTANT, constant),
}
