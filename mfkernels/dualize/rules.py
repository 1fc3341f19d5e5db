"""For each kind of operator: where the batch of its result is, and its tangent.

A rule takes the `Call` and the primal result (of an operator that writes in place: the tensor before it) and gives an
`Out` for each output that can have a tangent. It raises `Untracked` where the rows that carry tangents are no prefix
in the result, and `MixesRows` where samples would depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..attention import attention
from ..attention.reference import attention_tangent
from ..backend import requested_backend
from ..dual import Dual, tangent_of
from ..rms_norm import rms_norm
from . import formulas, views
from .call import Call, Out, Slot, differentiable, primal, tangent
from .rows import MixesRows, Untracked
from .views import broadcast, same, unknown

Rule = Callable[[Call, Any], list[Out]]


def rule_for(name: str, func: Any, view: bool) -> Rule:
    """The rule of an ATen operator that writes nothing."""
    by_kind = views.part if view else elementwise if torch.Tag.pointwise in func.tags else unknown
    return RULES.get(name, by_kind)


def foreign(call: Call, out: Any) -> list[Out]:
    raise NotImplementedError(f"{call.func} is no operator of PyTorch's own, so forward AD does not know it")


def constant(call: Call, out: Any) -> list[Out]:
    """Zero derivative wherever there is one: the result is a plain tensor."""
    return [Out(None)] * len(differentiable(out))


# ---------------------------------------------------------------------------------------------------------- elementwise


def elementwise(call: Call, out: Any) -> list[Out]:
    """Row i of the result depends on row i of each operand."""
    call.refuse_mixing()
    axes = {x.from_right for x in call.slots() if x.rows is not None}
    if len(axes) > 1:
        raise MixesRows(f"it broadcasts the batch along {len(axes)} dimensions, as differences of all pairs do")
    inner, from_right, rows = call.on_rows()
    formula, t = formulas.ELEMENTWISE.get(call.name), None
    if formula is not None and (call.name in formulas.HOLOMORPHIC or not out.is_complex()):
        try:
            t = formula(*inner.args, **inner.kwargs)
        except (TypeError, AttributeError):  # an overload that it does not know (rounding_mode=, a mask with a tangent)
            t = None
    if t is not None:
        return [broadcast(t, out, from_right, rows)]
    return [broadcast(t, o, from_right, rows) for t, o in zip(inner.jvp(), differentiable(out), strict=True)]


def dropout(call: Call, out: Any) -> list[Out]:
    """native_dropout, with the mask that it drew."""
    x, p, mask = call.args[0], call.args[1], out[1]
    if call.arg(2, "train") is False:
        return [Out(x.tangent, x.rows)]
    return [Out(x.tangent * x.small(mask) * (0.0 if p == 1 else 1 / (1 - p)), x.rows)]


def rrelu(call: Call, out: Any) -> list[Out]:
    """rrelu_with_noise, with the slopes that it drew."""
    if not call.alone():
        return unknown(call, out)
    (x, noise), given = call.args[:2], call.named()
    limits = given["lower"], given["upper"], given["training"], False
    return [Out(torch.ops.aten.rrelu_with_noise_backward(x.tangent, x.small(), x.small(noise), *limits), x.rows)]


# ----------------------------------------------------------------------------------------------------- along dimensions

_REDUCTIONS = """nansum var std var_mean std_mean amax amin aminmax logsumexp prod median nanmedian max min
    cummax cummin cumprod logcumsumexp _softmax _log_softmax _safe_softmax"""
# (position, keyword, default) of the dimensions that operators work along, and whether they are linear; None is all of
# them.
_ALONG: dict[tuple[int, str, Any, bool], str] = {
    (1, "dim", None, True): "sum mean cumsum _fft_r2c _fft_c2r _fft_c2c",
    (1, "dim", None, False): _REDUCTIONS,
    (1, "dim", -1, False): "sort mode glu",
    (2, "dim", None, False): "norm linalg_vector_norm",
    (2, "dim", -1, False): "topk kthvalue",
    (9, "dim", (-2, -1), True): "tril triu",
    (9, "dim", (-1,), True): "view_as_complex",
    (9, "dim", (), True): "view_as_real",
    (1, "dims", None, True): "flip",
    (2, "dims", None, True): "roll",
}
ALONG = {name: where for where, text in _ALONG.items() for name in text.split()}


def _keep_apart(x: Slot, dims: Collection[int]) -> None:
    if x.rows is not None and x.rows.axis in dims:
        raise MixesRows(f"it works along dimension {x.rows.axis} of {tuple(x.shape)}, which is the batch's")


def along(call: Call, out: Any) -> list[Out]:
    x, outs = call.args[0], differentiable(out)
    if not isinstance(x, Slot) or len(call.operands()) > 1:
        return unknown(call, out)
    position, keyword, default, is_linear = ALONG[call.name]
    if _torch.overload_of(call.func) == "stable":
        position = 9  # sort.stable has it by keyword alone
    dim = call.arg(position, keyword, default)
    if dim is None or isinstance(dim, bool) or dim == []:
        dim = range(x.ndim)
    dims = [d % max(x.ndim, 1) for d in ((dim,) if isinstance(dim, int) else dim)]
    _keep_apart(x, dims)
    if call.name in ("_softmax", "_safe_softmax"):
        tangents = [formulas.softmax(x.tangent, dims[0], x.small(outs[0]))]
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


# --------------------------------------------------------------------------------------------------------- contractions


def matmul(call: Call, out: Tensor) -> list[Out]:
    """mm, bmm, mv."""
    call.refuse_mixing()
    return [_product(call, call.func, *call.args)]


def _product(call: Call, func: Any, a: Any, b: Any) -> Out:
    """The tangent of func(a, b), a product of matrices: one operand's rows stay where they are, a batch is both's."""
    slots = [x for x in (a, b) if isinstance(x, Slot)]
    axes = [x.rows.axis for x in slots if x.rows is not None]
    if len(axes) == 2 and (axes != [0, 0] or slots[0].ndim != 3):
        raise MixesRows("it multiplies samples with samples")
    rows, ndim = slots[0].rows, slots[0].ndim
    p, q = primal(a), primal(b)
    if rows is not None:
        for x in slots:
            _keep_apart(x, [x.ndim - 1 if x is a else max(x.ndim - 2, 0)])
        batched = rows.axis == 0 and ndim == 3
        if len(slots) == 2 and not batched:
            raise Untracked(call.name)
        if batched:
            p, q = rows.take(p), rows.take(q)
    if any(x.rows != rows for x in slots):
        raise Untracked(call.name)
    first = func(a.tangent, q) if isinstance(a, Slot) else None
    return Out(formulas.total(first, func(p, b.tangent) if isinstance(b, Slot) else None), rows)


def addmm(call: Call, out: Tensor) -> list[Out]:
    """addmm, baddbmm, addmv: an addition and a product."""
    call.refuse_mixing()
    c, a, b = call.args[:3]
    parts = []
    if isinstance(a, Slot) or isinstance(b, Slot):
        t, rows, _ = _product(call, _PRODUCTS[call.name], a, b)
        parts.append(Out(formulas.times(t, call.kwargs.get("alpha", 1)), rows))
    if isinstance(c, Slot):
        t = formulas.times(c.tangent, call.kwargs.get("beta", 1))
        parts.append(broadcast(t, out, c.from_right, c.rows))
    if any(p.rows != parts[0].rows for p in parts):
        raise Untracked(call.name)
    return [Out(formulas.total(*(p.tangent for p in parts)), parts[0].rows)]


_PRODUCTS = {"addmm": torch.mm, "baddbmm": torch.bmm, "addmv": torch.mv}


# ---------------------------------------------------------------------------------------------------------------- norms


def layer_norm(call: Call, out: Any) -> list[Out]:
    """native_layer_norm."""
    if not call.alone():
        return unknown(call, out)
    (x, shape, weight), (y, mean, rstd) = call.args[:3], out
    _keep_apart(x, range(x.ndim - len(shape), x.ndim))
    t = formulas.layer_norm(x.small(), x.tangent, shape, x.small(mean), x.small(rstd), weight)
    return [Out(t.to(y.dtype), x.rows)]


def fused_rms_norm(call: Call, out: Any) -> list[Out]:
    """_fused_rms_norm."""
    x, shape, weight, eps = call.args[:4]
    if not call.alone(ndim=2) or len(shape) != 1:
        return unknown(call, out)
    _keep_apart(x, [x.ndim - 1])
    p = x.small()
    weight = p.new_ones(p.shape[-1]) if weight is None else weight
    eps = torch.finfo(p.dtype).eps if eps is None else eps
    return [Out(tangent_of(rms_norm(Dual(p, x.tangent), weight, eps=eps)), x.rows)]


def batch_norm(call: Call, out: Any) -> list[Out]:
    """native_batch_norm and its kin: of each channel, over all else."""
    if not call.alone():
        return unknown(call, out)
    x, given = call.args[0], call.named()
    weight, eps = given.get("weight"), given["eps"] if "eps" in given else given["epsilon"]
    if given.get("running_mean") is not None and not given.get("training", call.name == "_batch_norm_with_update"):
        if x.rows is not None and x.rows.axis == 1:
            return unknown(call, out)
        factor = torch.rsqrt(given["running_var"] + eps) * (1 if weight is None else weight)  # [C]
        return [Out((x.tangent * _channels(factor, x)).to(x.primal.dtype), x.rows)]
    if x.shape[0] != 1 or (x.rows is not None and x.rows.axis != 1):
        raise MixesRows("batch statistics in training mode; use eval() or another norm")
    # channels that are samples, as in an instance norm: a channel is one row of a layer norm
    p, dot = (a.reshape(*a.shape[:2], -1) for a in (x.small(), x.tangent))
    _, mean, rstd = torch.native_layer_norm(p, p.shape[-1:], None, None, eps)
    t = formulas.layer_norm(p, dot, p.shape[-1:], mean, rstd, None).reshape(x.tangent.shape)
    return [Out(t if weight is None else t * _channels(x.small(weight, 0), x), x.rows)]


def group_norm(call: Call, out: Any) -> list[Out]:
    """native_group_norm: a group is one row of a layer norm."""
    if not call.alone(axis=0):
        return unknown(call, out)
    x, weight, groups = call.args[0], call.arg(1, "weight"), call.args[6]
    p, dot = (a.reshape(len(a), groups, -1) for a in (x.small(), x.tangent))
    mean, rstd = (x.small(a, 0).reshape(len(p), groups, 1) for a in out[1:])
    t = formulas.layer_norm(p, dot, p.shape[-1:], mean, rstd, None).reshape(x.tangent.shape)
    return [Out((t if weight is None else t * _channels(weight, x)).to(out[0].dtype), x.rows)]


def _channels(weight: Tensor, x: Slot) -> Tensor:
    return weight.view(-1, *[1] * (x.ndim - 2))


# --------------------------------------------------------------------------------------------------------------- images


def linear(call: Call, out: Any) -> list[Out]:
    """An operator that is linear in its first argument, with the batch in dimension 0 before and after."""
    # dimension 0 of fewer is the channels'
    return same(call, out) if call.alone(4 if "shuffle" in call.name else 3, axis=0) else unknown(call, out)


def convolution(call: Call, out: Tensor) -> list[Out]:
    call.refuse_mixing()
    if call.alone() and call.args[0].rows is not None:
        x, weight, groups = call.args[0], call.args[1], call.args[8]
        axis = x.rows.axis
        if (axis == 1 and groups == 1) or (axis > 1 and weight.shape[axis] > 1):
            raise MixesRows(f"it works along dimension {axis} of {tuple(x.shape)}, which is the batch's")
    if not call.alone(axis=0):
        return unknown(call, out)
    x, weight, _, *rest = call.args
    return [Out(call.func(x.tangent, weight, None, *rest), x.rows)]


def pad(call: Call, out: Tensor) -> list[Out]:
    """constant_pad_nd, reflection_pad1d …: zeros or copies, sample by sample."""
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
    """Pooling by maxima, sampling …: the batch in dimension 0 of every operand, before and after."""
    x = call.slots()[0]
    if x.rows is None or x.rows.axis != 0 or x.ndim < 3 or any(y.shape[:1] != x.shape[:1] for y in call.operands()):
        return unknown(call, out)
    return [Out(t, x.rows) for t in call.on_rows()[0].jvp()]


# ------------------------------------------------------------------------------------------------------------ attention


def scaled_dot_product_attention(call: Call, out: Any) -> list[Out]:
    """PyTorch's fused kernels, whichever serves the call."""
    call.refuse_mixing()
    inner, from_right, rows = call.on_rows()
    if rows is not None and from_right < 3:
        raise MixesRows("a sequence dimension is the batch's")
    given, whole = inner.named(), call.named()
    if rows is not None and from_right == 3 and whole["query"].shape[1] != whole["key"].shape[1]:
        raise Untracked(call.name)  # heads that are samples, in groups
    if given.get("dropout_p", 0.0) > 0:
        raise NotImplementedError(
            "forward AD of dropout inside fused attention: it draws where dualize cannot see it; set dropout_p to 0"
        )
    mask = given.get("attn_mask", given.get("attn_bias"))
    q, k, v = (given[name] for name in ("query", "key", "value"))
    p = [primal(x).transpose(1, 2) for x in (q, k, v)]  # [B_t, N, H, d]
    dots = [x.tangent.transpose(1, 2) if isinstance(x, Slot) else None for x in (q, k, v)]
    scale, is_causal = given.get("scale"), given.get("is_causal", False)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    same_batch = mask is None and k.shape == v.shape and k.shape[0] == q.shape[0]
    if same_batch and (out[0].is_cuda or requested_backend("attention")):
        duals = [x if dot is None else Dual(x, dot) for x, dot in zip(p, dots, strict=True)]
        o_dot = tangent_of(attention(*duals, scale=scale, is_causal=is_causal))
    else:
        o_dot = attention_tangent(*p, *dots, scale, is_causal, primal(mask), tangent(mask))  # type: ignore[call-arg]
    o = out[0]
    return [broadcast(o_dot.transpose(1, 2).to(o.dtype), o, from_right, rows)]  # type: ignore[union-attr]


# Rules of operators that may put a batch together from its samples.
ASSEMBLES = (views.join, views.index_put, views.aligned, views.overwrite, unknown, pad)

_TABLE: dict[Rule, str] = {
    **views.TABLE,
    constant: """detach empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros
        new_ones new_full new_empty_strided bernoulli multinomial sign round special_round floor ceil trunc fix
        floor_divide eq ne lt le gt ge logical_and logical_or logical_not logical_xor random normal uniform exponential
        log_normal cauchy geometric""",
    # and all that PyTorch tags as pointwise, which not all versions do of these
    elementwise: """addcdiv addcmul celu clamp clamp_max clamp_min complex elu hardsigmoid hardswish hardtanh heaviside
        leaky_relu lerp log_sigmoid_forward logit masked_fill mish _prelu_kernel polar softplus softshrink hardshrink
        threshold where xlogy nan_to_num copysign square""",
    along: " ".join(ALONG),
    matmul: "mm bmm mv",
    addmm: " ".join(_PRODUCTS),
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
