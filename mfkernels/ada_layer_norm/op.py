from __future__ import annotations

import torch
from torch import Tensor

from ..backend import rows_unsupported
from ..checks import autocast_dtype, check_number, check_operand, check_same, check_shape
from ..dual import TensorOrDual
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..router import Backend, DualOp
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype of an expression of all of them (they differ under autocast alone)."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def normed_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a norm's output. Under autocast it is autocast's: a product reads it, and would cast it first."""
    return autocast_dtype(promoted(*tensors), tensors[0].device)


@operator("ada_layer_norm_forward")
def _forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """h (B, N, D), its tangent (B_t, N, D) with B_t = 0 where there is none, mean and rstd (B, N, 2) float32."""
    from .kernels import Tangents, norm_forward

    _, h, _, h_dot, stats = norm_forward(
        x,
        None,
        None,
        shift,
        scale,
        Tangents(x=x_dot, shift=shift_dot, scale=scale_dot),
        eps=eps,
        x_dtype=x.dtype,
        h_dtype=dtype,
    )
    return h, tangent_or_empty(h_dot, h), stats


@_forward.register_fake
def _(x, shift, scale, x_dot, shift_dot, scale_dot, eps, dtype):  # type: ignore[no-untyped-def]
    rows = num_tangent_rows(x_dot, shift_dot, scale_dot)
    B, N, D = x.shape
    h = x.new_empty((B, N, D), dtype=dtype)
    return h, h.new_empty((rows, N, D)), x.new_empty((B, N, 2), dtype=torch.float32)


@operator("ada_layer_norm_backward")
def _backward(dh: Tensor, x: Tensor, scale: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """dx (B, N, D) and [dshift, dscale] (2, B, D)."""
    from .kernels import norm_backward

    dx, _, dmodulation, _ = norm_backward(dh, None, x, None, scale, stats)
    return dx, dmodulation


@_backward.register_fake
def _(dh, x, scale, stats):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), scale.new_empty((2, *scale.shape))


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, scale, *_ = inputs
    return x, scale, output[2]


def _gradients(ctx, dh):  # type: ignore[no-untyped-def]
    dx, (dshift, dscale) = _backward(dh, *ctx.saved_tensors)
    return dx, dshift, dscale


_forward.register_gradients(_gradients, save=_saved)

# ------------------------------------------------------------------------------------------------- the public function


def ada_layer_norm(x: TensorOrDual, shift: TensorOrDual, scale: TensorOrDual, *, eps: float = 1e-6) -> TensorOrDual:
    """LayerNorm without weights, then the sample's own scale and shift: y = x̂ (1 + scale) + shift.

    DiT's "modulate(norm(x), shift, scale)" (arXiv 2212.09748, §3.2, adaLN). Statistics are computed in float32 or
    better. Tangent: ẏ = x̂_dot (1 + scale) + x̂∘scale_dot + shift_dot, x̂_dot = rstd·(ẋ − mean(ẋ) − x̂·mean(x̂∘ẋ));
    under `torch.func.jvp` or `forward_ad` the same rule serves plain tensors.

    Args:
        x: (B, N, D) tensor or Dual.
        shift, scale: (B, D) tensors or Duals; views with any strides.
        eps: added to the variance, >= 0.

    Returns:
        (B, N, D); a Dual if any argument is one. In the arguments' dtype; under autocast in autocast's, unless they are
        float64.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the requested backend cannot serve the call.
    """
    return _ada_layer_norm(x, shift, scale, check_number("eps", eps, 0))


def check_ada_layer_norm(x: TensorOrDual, shift: TensorOrDual, scale: TensorOrDual) -> None:
    check_operand("x", x, 3)
    for name, m in (("shift", shift), ("scale", scale)):
        check_operand(name, m, 2)
        check_shape(name, m, (x.shape[0], x.shape[2]), "(B, D) of x")
        check_same(name, m, "x", x)


_ada_layer_norm = DualOp(
    "ada_layer_norm",
    ["x", "shift", "scale"],
    check=check_ada_layer_norm,
    reference=reference.ada_layer_norm,
    tangent=reference.ada_layer_norm_tangent,
    backends={"triton": Backend(_forward, rows_unsupported)},
    derived=lambda **primals: (normed_dtype(*primals.values()),),
)
