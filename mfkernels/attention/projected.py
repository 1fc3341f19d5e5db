"""Self-attention of a joint projection to q, k and v as one op, so that its backward writes dqkv once.

Of three views of one qkv autograd gets three gradients and stacks them, and the bias's gradient is a pass of its own.
Here the kernels write into one buffer, and give its sum over the tokens as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import recorded, requested_part
from ..calls import cache_key, cached, is_untransformed, store
from ..dual import TensorOrDual, linear_map, primal_of, split_map
from ..linear import linear
from ..linear.op import check_linear
from ..operator import num_tangent_rows, operator
from ..products import in_dtype, product_dtype, weight_gradient, without_autocast
from ..router import run_on_duals
from . import op
from .backward import attention_backward_by, by_length

# ------------------------------------------------------------------------------------------- operator and its rules


@operator("projected_attention_forward")
def _forward(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
    dtype: torch.dtype,
    backend: str,
    backward: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o (B, N, D) and its tangent (B_t, N, D), B_t = 0 without one.

    Then what the backward reads: qkv (B, N, 3, H, d), lse (B, H, N), and x and the weight in `dtype`, each (0,) where
    it is given in that.
    """
    x_low, low = in_dtype(x, dtype), in_dtype(weight, dtype)
    qkv = F.linear(x_low, low, None if bias is None else in_dtype(bias, dtype))  # [B, N, 3·D]
    qkv_dot = None if x_dot is None else F.linear(in_dtype(x_dot, dtype), low)  # [B_t, N, 3·D]
    B, N, D = x.shape
    heads = (N, 3, num_heads, D // num_heads)
    qkv = qkv.view(B, *heads)  # [B, N, 3, H, d]
    dots = (None,) * 3 if qkv_dot is None else qkv_dot.view(qkv_dot.shape[0], *heads).unbind(2)  # [B_t, N, H, d] each
    o, o_dot, lse = op.forward.nested(*qkv.unbind(2), *dots, scale, False, backend, backward)
    lows = [qkv.new_empty(0) if a is b else a for a, b in ((x_low, x), (low, weight))]
    return o.view(x.shape), o_dot.view(o_dot.shape[0], N, D), qkv, lse, lows[0], lows[1]


@_forward.register_fake
def _(x, x_dot, weight, bias, num_heads, scale, dtype, backend, backward):  # type: ignore[no-untyped-def]
    B, N, D = x.shape
    o = x.new_empty(x.shape, dtype=dtype)
    o_dot = o.new_empty((num_tangent_rows(x_dot), N, D))
    qkv, lse = o.new_empty((B, N, 3, num_heads, D // num_heads)), o.new_empty((B, num_heads, N), dtype=torch.float32)
    return (
        o,
        o_dot,
        qkv,
        lse,
        *(o.new_empty(0) if a.dtype == dtype else torch.empty_like(a, dtype=dtype) for a in (x, weight)),
    )


@operator("packed_attention_backward")
def _packed(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float, bias_dtype: torch.dtype | None, backward: str
) -> tuple[Tensor, Tensor]:
    """dqkv (B, N, 3, H, d) of do and o (B, N, H, d), and its sum over the tokens (3·D,), (0,) without `bias_dtype`."""
    if backward == "by-length":
        backward = by_length(qkv[:, :, 0], qkv[:, :, 1], causal=False)
    if backward == "triton":
        from .backward_kernels import packed_backward

        precision = op.product_precision(qkv)
        dqkv, dbias = packed_backward(do, qkv, o, lse, scale=scale, precision=precision, bias_dtype=bias_dtype)
    else:
        q, k, v = qkv.unbind(2)  # [B, N, H, d] each
        dqkv = torch.stack(attention_backward_by(backward, do, q, k, v, o, lse, scale=scale), dim=2)  # [B, N, 3, H, d]
        dbias = None if bias_dtype is None else dqkv.sum((0, 1), dtype=bias_dtype).flatten()  # [3·D]
    return dqkv, dqkv.new_empty(0) if dbias is None else dbias


@_packed.register_fake
def _(do, qkv, o, lse, scale, bias_dtype, backward):  # type: ignore[no-untyped-def]
    dbias = qkv.new_empty(0) if bias_dtype is None else qkv.new_empty(qkv.shape[2:].numel(), dtype=bias_dtype)
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), dbias


@operator("projected_attention_backward")
def _backward(
    do: Tensor,
    x: Tensor,
    weight: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    dtype: torch.dtype,
    has_bias: bool,
    backward: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, N, D), and in `dtype` the gradients of the weight (3·D, D) and of the bias (3·D,), (0,) without one."""
    B, N, _, H, d = qkv.shape
    do, o = do.reshape(B, N, H, d), o.view(B, N, H, d)  # [B, N, H, d]
    dqkv, dbias = _packed.nested(do, qkv, o, lse, scale, dtype if has_bias else None, backward)
    rows = dqkv.view(B * N, 3 * H * d)  # [B·N, 3·D]
    with without_autocast(x.device):
        dx = torch.mm(rows, weight).view(x.shape)  # [B, N, D]
        dweight = weight_gradient(rows, x.reshape(B * N, H * d), dtype)  # [3·D, D]
    return dx, dweight, dbias


@_backward.register_fake
def _(do, x, weight, qkv, o, lse, scale, dtype, has_bias, backward):  # type: ignore[no-untyped-def]
    dbias = x.new_empty(weight.shape[0], dtype=dtype) if has_bias else x.new_empty(0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=dtype), dbias


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, weight, bias, _, ctx.scale, dtype, _, ctx.backward = inputs
    o, _, qkv, lse, *low = output
    ctx.has_bias, ctx.dtype = bias is not None, weight.dtype
    x, weight = (a if a.dtype == dtype else b for a, b in zip((x, weight), low, strict=True))
    return x, weight, qkv, o, lse


def _gradients(ctx, do):  # type: ignore[no-untyped-def]
    rest = (ctx.scale, ctx.dtype, ctx.has_bias, ctx.backward)
    dx, dweight, dbias = _backward.visible_to_modes(do, *ctx.saved_tensors, *rest)
    return dx, None, dweight, dbias if ctx.has_bias else None


_forward.register_gradients(_gradients, save=_saved)


# ----------------------------------------------------------------------------------------------- for the module alone


def projected_attention(x: TensorOrDual, weight: Tensor, bias: Tensor | None, num_heads: int) -> TensorOrDual:
    """`attention` of q, k, v = x Wᵀ + b, without a mask and with scale d^(-1/2): (B, N, D), of the kind of x.

    Args:
        x: (B, N, D) tensor or Dual.
        weight: (3·D, D), of q, k and v in this order.
        bias: (3·D,) or None.
        num_heads: H, a divisor of D.
    """
    H, d = num_heads, x.shape[-1] // num_heads
    key = cache_key("projected_attention", x, weight, bias, num_heads)
    fits = len(x.shape) == 3 and x.shape[1] > 0 and d > 0 and tuple(weight.shape) == (3 * x.shape[2], x.shape[2])
    if fits and (key is not None or is_untransformed(x, weight, bias)):
        xp, dtype = primal_of(x), product_dtype(x)
        backend = cached(key)
        if backend is None or requested_part("attention_backward"):  # which depends on PyTorch's settings too
            check_linear(x, weight, bias)
            like = xp.new_empty((1,), dtype=dtype).expand(*xp.shape[:2], H, d)  # [B, N, H, d], as q and k will be
            backend, backward = op.choose_backends(like)
            store(key, backend)
        else:
            backend, backward = recorded("attention", backend), "triton"
        if backend != "reference":
            rest = (weight, bias, H, d**-0.5, dtype, backend, backward)
            return run_on_duals(_forward.visible_to_modes, (x,), rest)
    qkv = linear(x, weight, bias)  # [B, N, 3·D]
    q, k, v = split_map(lambda a: a.unflatten(-1, (3, H, d)).unbind(2), qkv)  # [B, N, H, d] each, views
    o = op.attention(q, k, v)  # [B, N, H, d]
    return linear_map(lambda a: a.flatten(2), o)  # [B, N, D]
