"""The properties of each ATen operator: its tangent rule, and whether it makes views, writes in place or is refused.

A rule takes the `Call` and the primal result (of an operator that writes in place: the tensor before the write) and
returns an `Out` for each output that can have a tangent. It raises `Untracked` where the rows with tangents are not
the first of one dimension of the result, and `MixesRows` where samples would depend on each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from ..attention import attention
from ..attention.reference import attention_tangent
from ..backend import requested_backend
from ..dual import Dual, tangent_of
from ..rms_norm import rms_norm
from . import views
from .call import NOT_COMPUTED, Call, MixesRows, Out, Slot, Untracked, differentiable, primal, tangent
from .elementwise import aten, dropout, elementwise, rrelu, times, total
from .report import Report, refused
from .views import broadcast, by_jvp, same

Rule = Callable[[Call, Any], list[Out]]


def not_aten(call: Call, out: Any) -> list[Out]:
    raise NotImplementedError(f"{call.func} is no operator of PyTorch's own, so forward AD does not know it")


def constant(call: Call, out: Any) -> list[Out]:
    """The derivative is zero, or not defined."""
    return [Out(None)] * len(differentiable(out))


# ----------------------------------------------------------------------------------------------------- along dimensions

# Of operators that have no argument that names them.
_DIMS = {"tril": (-2, -1), "triu": (-2, -1), "view_as_complex": (-1,), "view_as_real": ()}


def _refuse_batch_in(x: Slot, dims: Collection[int]) -> None:
    if x.rows is not None and x.rows.axis in dims:
        raise MixesRows(f"it works along dimension {x.rows.axis} of {tuple(x.shape)}, which is the batch's")


def along(call: Call, out: Any, *, is_linear: bool = False) -> list[Out]:
    """Reductions, sorts …, along the dimensions that the argument `dim` or `dims` names, by default all."""
    x, outs = call.args[0], differentiable(out)
    if not isinstance(x, Slot) or len(call.operands()) > 1:
        return by_jvp(call, out)
    given = call.named()
    dim = given.get("dim", given.get("dims", _DIMS.get(call.name)))
    if dim is None or dim == []:
        dim = range(x.ndim)
    dims = [d % max(x.ndim, 1) for d in ((dim,) if isinstance(dim, int) else dim)]
    _refuse_batch_in(x, dims)
    if call.name in ("_softmax", "_safe_softmax"):
        p = x.take(outs[0])
        # softmax's Jacobian diag(p) − ppᵀ is symmetric: its VJP kernel is its JVP
        tangents = [_torch.softmax_backward(x.tangent.to(p.dtype), p, dims[0], p.dtype)]
    elif is_linear:
        tangents = [call.func(x.tangent.contiguous(), *call.args[1:], **call.kwargs)]
    else:
        tangents = call.on_rows()[0].jvp()
    result = []
    for leaf, t in zip(outs, tangents, strict=True):
        rows = x.rows
        if rows is not None and leaf.ndim < x.ndim and call.name != "view_as_complex":  # without keepdim
            rows = rows.at(rows.axis - sum(d < rows.axis for d in dims))
        result.append(Out(t, rows))
    return result


def linear_along(call: Call, out: Any) -> list[Out]:
    """`along` of an operator that is linear: its tangent is the operator on the operand's tangent."""
    return along(call, out, is_linear=True)


# --------------------------------------------------------------------------------------------------------- contractions


def _product(call: Call, func: Any, a: Any, b: Any) -> Out:
    """The tangent of the matrix product func(a, b), with the batch in one operand or in dimension 0 of both."""
    slots = [x for x in (a, b) if isinstance(x, Slot)]
    axes = [x.rows.axis for x in slots if x.rows is not None]
    if len(axes) == 2 and (axes != [0, 0] or slots[0].ndim != 3):
        raise MixesRows("it multiplies samples with samples")
    rows, ndim = slots[0].rows, slots[0].ndim
    p, q = primal(a), primal(b)
    if rows is not None:
        for x in slots:
            _refuse_batch_in(x, [x.ndim - 1 if x is a else max(x.ndim - 2, 0)])
        batched = rows.axis == 0 and ndim == 3
        if len(slots) == 2 and not batched:
            raise Untracked(call.name)
        if batched:
            p, q = rows.take(p), rows.take(q)
    if any(x.rows != rows for x in slots):
        raise Untracked(call.name)
    first = func(a.tangent, q) if isinstance(a, Slot) else None
    return Out(total(first, func(p, b.tangent) if isinstance(b, Slot) else None), rows)


def matmul(call: Call, out: Tensor) -> list[Out]:
    """mm, bmm, mv; and addmm, baddbmm, addmv, whose first argument is added to the product."""
    call.refuse_mixing()
    *added, a, b = call.args[: 3 if call.name in _PRODUCTS else 2]
    parts = []
    if isinstance(a, Slot) or isinstance(b, Slot):
        t, rows, _ = _product(call, _PRODUCTS.get(call.name, call.func), a, b)
        parts.append(Out(times(t, call.kwargs.get("alpha", 1)), rows))
    for c in added:
        if isinstance(c, Slot):
            parts.append(broadcast(times(c.tangent, call.kwargs.get("beta", 1)), out, c.from_right, c.rows))
    if len(parts) == 1:
        return parts
    (t, rows, _), (c_dot, c_rows, _) = parts
    if rows != c_rows:
        raise Untracked(call.name)
    return [Out(total(t, c_dot), rows)]


_PRODUCTS = {"addmm": torch.mm, "baddbmm": torch.bmm, "addmv": torch.mv}


# ---------------------------------------------------------------------------------------------------------------- norms


def _layer_norm_tangent(x: Tensor, x_dot: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor) -> Tensor:
    # the Jacobian of x̂ is symmetric: LayerNorm's VJP kernel, without weight, is its JVP
    inputs = x_dot.contiguous(), x.contiguous(), shape, mean.contiguous(), rstd.contiguous()
    return aten.native_layer_norm_backward(*inputs, None, None, [True, False, False])[0]


def layer_norm(call: Call, out: Any) -> list[Out]:
    """native_layer_norm."""
    if not call.only_first():
        return by_jvp(call, out)
    (x, shape, weight), (_, mean, rstd) = call.args[:3], out
    _refuse_batch_in(x, range(x.ndim - len(shape), x.ndim))
    t = _layer_norm_tangent(x.take(), x.tangent, shape, x.take(mean), x.take(rstd))
    return [Out(t if weight is None else t * weight, x.rows)]


def fused_rms_norm(call: Call, out: Any) -> list[Out]:
    """_fused_rms_norm."""
    x, shape, weight, eps = call.args[:4]
    if not call.only_first(ndim=2) or len(shape) != 1:
        return by_jvp(call, out)
    _refuse_batch_in(x, [x.ndim - 1])
    p = x.take()
    weight = p.new_ones(p.shape[-1]) if weight is None else weight
    eps = torch.finfo(p.dtype).eps if eps is None else eps
    return [Out(tangent_of(rms_norm(Dual(p, x.tangent), weight, eps=eps)), x.rows)]


def batch_norm(call: Call, out: Any) -> list[Out]:
    """native_batch_norm and its variants: each channel over all other dimensions."""
    if not call.only_first():
        return by_jvp(call, out)
    x, given = call.args[0], call.named()
    weight, eps = given.get("weight"), given["eps"] if "eps" in given else given["epsilon"]
    if given.get("running_mean") is not None and not given.get("training", call.name == "_batch_norm_with_update"):
        if x.rows is not None and x.rows.axis == 1:
            return by_jvp(call, out)
        factor = torch.rsqrt(given["running_var"] + eps) * (1 if weight is None else weight)  # [C]
        return [Out(x.tangent * _channels(factor, x), x.rows)]
    if x.shape[0] != 1 or (x.rows is not None and x.rows.axis != 1):
        raise MixesRows("batch statistics in training mode; use eval() or another norm")
    # channels that are samples, as in an instance norm
    channels = x.tangent.shape[1]
    p = x.take().reshape(1, channels, -1)
    _, mean, rstd = torch.native_layer_norm(p, p.shape[-1:], None, None, eps)
    return [_norm_of_groups(x, channels, mean, rstd, None if weight is None else x.take(weight, 0))]


def group_norm(call: Call, out: Any) -> list[Out]:
    """native_group_norm."""
    if not call.only_first(axis=0):
        return by_jvp(call, out)
    x, weight, groups = call.args[0], call.arg(1, "weight"), call.args[6]
    mean, rstd = (x.take(a, 0)[..., None] for a in out[1:])  # [B_t, groups, 1]
    return [_norm_of_groups(x, groups, mean, rstd, weight)]


def _norm_of_groups(x: Slot, groups: int, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Out:
    """A group of channels is one row of a layer norm."""
    p, dot = (a.reshape(len(a), groups, -1) for a in (x.take(), x.tangent))
    t = _layer_norm_tangent(p, dot, p.shape[-1:], mean, rstd).reshape(x.tangent.shape)
    return Out(t if weight is None else t * _channels(weight, x), x.rows)


def _channels(weight: Tensor, x: Slot) -> Tensor:
    return weight.view(-1, *[1] * (x.ndim - 2))


# --------------------------------------------------------------------------------------------------------------- images


def linear(call: Call, out: Any) -> list[Out]:
    """An operator that is linear in its first argument, with the batch in dimension 0 of argument and result."""
    # with fewer dimensions, dimension 0 is that of the channels
    return same(call, out) if call.only_first(4 if "shuffle" in call.name else 3, axis=0) else by_jvp(call, out)


def convolution(call: Call, out: Tensor) -> list[Out]:
    call.refuse_mixing()
    x, weight, _, *rest = call.args
    groups = call.args[8]
    if call.only_first():
        mixed = [groups == 1, *(n > 1 for n in weight.shape[2:])]  # of dimensions 1, 2 …
        _refuse_batch_in(x, [d for d, is_mixed in enumerate(mixed, 1) if is_mixed])
    if not call.only_first(axis=0):
        return by_jvp(call, out)
    return [Out(call.func(x.tangent, weight, None, *rest), x.rows)]


def pad(call: Call, out: Tensor) -> list[Out]:
    """constant_pad_nd, reflection_pad1d …, within samples."""
    x, amounts = call.args[:2]
    rows = x.rows
    if rows is not None:
        i = x.ndim - 1 - rows.axis
        if 2 * i < len(amounts) and any(amounts[2 * i : 2 * i + 2]):
            raise Untracked(call.name)
    if call.name == "constant_pad_nd":
        return [Out(call.func(x.tangent, amounts, 0), rows)]
    return same(call, out)


def by_sample(call: Call, out: Any) -> list[Out]:
    """Max pooling, grid sampling …, with the batch in dimension 0 of all operands and results."""
    x = call.slots()[0]
    if x.rows is None or x.rows.axis != 0 or x.ndim < 3 or any(y.shape[:1] != x.shape[:1] for y in call.operands()):
        return by_jvp(call, out)
    return [Out(t, x.rows) for t in call.on_rows()[0].jvp()]


# ------------------------------------------------------------------------------------------------------------ attention


def scaled_dot_product_attention(call: Call, out: Any) -> list[Out]:
    """All of PyTorch's fused kernels, by the op of this package or its reference tangent."""
    call.refuse_mixing()
    inner, from_right, rows = call.on_rows()
    if rows is not None and from_right < 3:
        raise MixesRows("the batch is in the dimension of queries, keys or channels")
    if rows is not None and from_right == 3 and call.args[0].shape[1] != call.args[1].shape[1]:
        raise Untracked(call.name)  # heads that are samples, in groups
    given = inner.named()
    if given["dropout_p"] > 0:
        raise NotImplementedError(
            "forward AD of dropout inside fused attention: its mask is not available to dualize; set dropout_p to 0"
        )
    mask = given.get("attn_mask", given.get("attn_bias"))
    q, k, v = (given[name] for name in ("query", "key", "value"))
    p = [primal(x).transpose(1, 2) for x in (q, k, v)]  # [B_t, N, H, d]
    dots = [x.tangent.transpose(1, 2) if isinstance(x, Slot) else None for x in (q, k, v)]
    is_causal = given["is_causal"]
    scale = q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    same_batch = mask is None and k.shape == v.shape and k.shape[0] == q.shape[0]
    if same_batch and (out[0].is_cuda or requested_backend("attention")):
        duals = [x if dot is None else Dual(x, dot) for x, dot in zip(p, dots, strict=True)]
        o_dot = tangent_of(attention(*duals, scale=scale, is_causal=is_causal))
    else:
        o_dot = attention_tangent(*p, *dots, scale, is_causal, primal(mask), tangent(mask))  # type: ignore[call-arg]
    o = out[0]
    return [broadcast(o_dot.transpose(1, 2), o, from_right, rows)]  # type: ignore[union-attr]


# Rules of operators whose operands may be different samples, from which they assemble a batch.
ASSEMBLES = (views.join, views.index_put, views.aligned, views.overwrite, by_jvp, pad)

_TABLE: dict[Rule, str] = {
    **views.TABLE,
    constant: """detach empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros
        new_ones new_full new_empty_strided bernoulli multinomial sign round special_round floor ceil trunc fix
        floor_divide eq ne lt le gt ge logical_and logical_or logical_not logical_xor random normal uniform exponential
        log_normal cauchy geometric""",
    # and all operators with PyTorch's tag `pointwise`, which these lack in some versions
    elementwise: """addcdiv addcmul celu clamp clamp_max clamp_min complex elu hardsigmoid hardswish hardtanh heaviside
        leaky_relu lerp log_sigmoid_forward logit masked_fill mish _prelu_kernel polar softplus softshrink hardshrink
        threshold where xlogy nan_to_num copysign square""",
    along: """nansum var std var_mean std_mean amax amin aminmax logsumexp prod median nanmedian max min cummax cummin
        cumprod logcumsumexp _softmax _log_softmax _safe_softmax sort mode glu norm linalg_vector_norm topk kthvalue""",
    linear_along: """sum mean cumsum flip roll tril triu view_as_complex view_as_real _fft_r2c _fft_c2r _fft_c2c""",
    matmul: "mm bmm mv " + " ".join(_PRODUCTS),
    layer_norm: "native_layer_norm",
    fused_rms_norm: "_fused_rms_norm",
    group_norm: "native_group_norm",
    batch_norm: """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
        _batch_norm_with_update _batch_norm_no_update miopen_batch_norm""",
    dropout: "native_dropout",
    rrelu: "rrelu_with_noise rrelu_with_noise_functional",
    convolution: "convolution",
    pad: """constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d""",
    linear: """avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d pixel_shuffle pixel_unshuffle
        native_channel_shuffle channel_shuffle im2col col2im upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
        upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa""",
    by_sample: """max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d
        grid_sampler_2d grid_sampler_3d""",
    scaled_dot_product_attention: """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable""",
}
RULES = {name: rule for rule, text in _TABLE.items() for name in text.split()}


# ------------------------------------------------------------------------------------------------------------ operators


class Operator(NamedTuple):
    """What dualize needs to know of an ATen operator.

    name: without overload and trailing underscore.
    reshapes: whether it changes the shape of its first argument in place.
    functional: the out-of-place variant of an operator that writes into its first argument.
    refusal: why it cannot take an operand with a tangent; None if it can.
    """

    name: str
    rule: Rule
    constant: bool
    view: bool
    in_place: bool
    reshapes: bool
    functional: Any
    refusal: str | None


NUMBER = (
    "a number taken out of a tensor has no derivative, so what is computed from it would lack one; keep it a tensor, "
    "or detach() it if it is a constant by design"
)
MEMORY = "it accesses the memory of a tensor, which does not hold the tangent; reshape, index or slice it instead"
RESHAPES = (
    "it changes in place the shape of a tensor that is a view or has views, which autograd cannot differentiate here; "
    "use the function without the underscore"
)
_FAST_PATH = (
    "PyTorch's fused transformer layer has no forward-mode rule; torch.backends.mha.set_fastpath_enabled(False) gives "
    "the layer's own operations"
)
_REFUSED = {
    "_local_scalar_dense": NUMBER,
    **dict.fromkeys(("as_strided", "as_strided_", "set_", "resize_", "resize_as_", "as_strided_scatter"), MEMORY),
    "mkldnn_rnn_layer": "oneDNN's LSTM has no forward-mode rule; torch.backends.mkldnn.flags(enabled=False) avoids it",
    **dict.fromkeys(("_transformer_encoder_layer_fwd", "_native_multi_head_attention"), _FAST_PATH),
}
# Views in PyTorch that are copies here: the conjugate and negative bits are not resolved below autograd.
COPIED_VIEWS = frozenset(["_conj", "_neg_view"])
_SHOWN = {"_local_scalar_dense": "item"}


def _out_of_place(name: str, func: Any) -> Any:
    """The overload of the operator `name` that has the arguments of `func`; overload names can differ."""
    packet = getattr(aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    return next((overload for overload in overloads if _types(overload) == _types(func)), None)


def _types(func: Any) -> list[str]:
    return [str(a.type) for a in _torch.schema_of(func).arguments]


@cache
def operator(func: Any) -> Operator:
    """The properties of an OpOverload."""
    arguments = _torch.schema_of(func).arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    aliased = any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
    packet = func.overloadpacket.__name__
    in_place = written == [0] and not arguments[0].kwarg_only
    name = packet.removesuffix("_") if in_place else packet
    refusal = _REFUSED.get(packet)
    functional = None
    if func.namespace != "aten":
        if written:
            refusal = f"{func} writes into a tensor and has no forward-mode (JVP) rule"
        return Operator(str(func), not_aten, False, False, in_place, False, None, refusal)
    if refusal is None and any(arguments[i].kwarg_only for i in written):
        refusal = "out= is not supported; use the result it returns"
    if in_place and refusal is None:
        functional = _out_of_place(name, func)
        if functional is None and RULES.get(name) is not constant:
            refusal = "it writes in place, and there is no out-of-place operator with the same arguments"
    view = aliased and not written and name not in COPIED_VIEWS
    kind = views.part if view else elementwise if torch.Tag.pointwise in (functional or func).tags else by_jvp
    rule = RULES.get(name, kind)
    name = _SHOWN.get(name, name)
    reshapes = functional is not None and rule is not constant and torch.Tag.inplace_view in func.tags
    return Operator(name, rule, rule is constant and not in_place, view, in_place, reshapes, functional, refusal)


# --------------------------------------------------------------------------------------------------- tangents of a call


def tangents(op: Operator, call: Call, out: Any, shared: list[Tensor], batch: int, report: Report | None) -> list[Out]:
    """Tangents by the operator's rule; of all rows, with zeros, where the batch cannot be tracked."""
    primals = differentiable(out)
    if not primals:
        return []
    start = time.perf_counter() if report else 0.0
    try:
        try:
            outs = _fitting(op.rule(call, out), primals, shared)
        except Untracked:
            if report:
                report.zero_filled[call.name] += 1
            outs = _fitting(op.rule(call.dense(), out), primals, shared)
        if report:
            report.add(call.name, by_jvp=bool(call.jvps), seconds=time.perf_counter() - start)
        return _of_one_sample(op, call, outs, batch)
    except Untracked as error:
        raise refused(call.name, "its tangent cannot be tracked") from error
    except MixesRows as error:
        raise refused(call.name, f"mixes batch rows ({error}), so no sample has a derivative of its own") from error
    except (NotImplementedError, RuntimeError) as error:
        text = str(error)
        if text.startswith("dualize:") or ("forward AD" not in text and "jvp" not in text):
            raise
        raise refused(call.name, f"has no forward-mode (JVP) rule in PyTorch: {text.splitlines()[0]}") from error


def _of_one_sample(op: Operator, call: Call, outs: list[Out], batch: int) -> list[Out]:
    """`outs` with `sample` set where all operands depend on the same single sample."""
    if op.rule in ASSEMBLES or op.name == "where":
        return outs  # samples without a tangent are plain tensors there, so several may be involved
    slots = call.slots()
    if any(out.sample is not None for out in outs):
        of_all = all(slot.rows is None or slot.rows.batch == batch for slot in slots)
        return outs if of_all else [out._replace(sample=None) for out in outs]
    sample = slots[0].sample
    if sample is None or any(slot.sample != sample for slot in slots):
        return outs
    return [out._replace(sample=sample) for out in outs]


def _fitting(outs: list[Out], primals: list[Tensor], shared: list[Tensor]) -> list[Out]:
    """`outs` in the primals' dtypes, in memory that no later write changes.

    shared: tangents of operands in memory that later writes may change.

    Raises:
        Untracked: the shape of one does not fit its primal and its rows.
    """
    fitting, missing = [], len(primals) - len(outs)
    for p, (t, rows, sample) in zip(primals, outs + [NOT_COMPUTED] * missing, strict=True):
        if t is not None:
            if not (t.shape == p.shape if rows is None else rows.fit(t.shape, p.shape)):
                raise Untracked("shape")
            t = t if t.dtype == p.dtype else t.to(p.dtype)
            if any(_torch.memory_of(t) == _torch.memory_of(s) for s in shared):
                t = t.clone()
        fitting.append(Out(t, rows, sample))
    return fitting
