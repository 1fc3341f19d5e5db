from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import rows_unsupported
from ..checks import check_constant, check_flag, check_number, check_operand, check_same
from ..dual import TensorOrDual
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..router import Backend, DualOp
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules
# `rotary` is the op without weights.


@operator("rotary_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k, contiguous, and their tangents, with no rows where there is none."""
    from .kernels import rotary_forward

    q_out, k_out, q_out_dot, k_out_dot = rotary_forward(
        q, k, q_dot, k_dot, q_weight, k_weight, cos, sin, eps=eps, interleaved=interleaved
    )
    return q_out, k_out, tangent_or_empty(q_out_dot, q_out), tangent_or_empty(k_out_dot, k_out)


@_forward.register_fake
def _(q, k, q_dot, k_dot, q_weight, k_weight, cos, sin, eps, interleaved):  # type: ignore[no-untyped-def]
    pairs = ((q, q_dot), (k, k_dot))
    primals = (x.new_empty(x.shape) for x, _ in pairs)
    return *primals, *(x.new_empty((num_tangent_rows(dot), *x.shape[1:])) for x, dot in pairs)


@operator("rotary_backward", outputs_like=("dq", "dk"))
def _backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    from .kernels import rotary_forward

    none = (None,) * 4
    return rotary_forward(dq, dk, *none, cos, sin, interleaved=interleaved, backward=True)[:2]


@operator("qk_norm_rotary_backward")
def _norm_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, of k, and of both weights (2, d) in float32."""
    from .backward_kernels import qk_norm_rotary_backward

    return qk_norm_rotary_backward(dq, dk, q, k, q_weight, k_weight, cos, sin, eps=eps, interleaved=interleaved)


@_norm_backward.register_fake
def _(dq, dk, q, k, q_weight, k_weight, cos, sin, eps, interleaved):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty((2, q.shape[-1]), dtype=torch.float32)


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, _, _, q_weight, k_weight, cos, sin, ctx.eps, ctx.interleaved = inputs
    ctx.shapes = q.shape, k.shape
    ctx.normed = q_weight is not None
    return (q, k, q_weight, k_weight, cos, sin) if ctx.normed else (cos, sin)  # the rotation alone is linear


def _gradients(ctx, dq, dk):  # type: ignore[no-untyped-def]
    # where one of the two is not used
    dq = dk.new_zeros(ctx.shapes[0]) if dq is None else dq
    dk = dq.new_zeros(ctx.shapes[1]) if dk is None else dk
    if not ctx.normed:
        return _backward(dq, dk, *ctx.saved_tensors, ctx.interleaved)
    _, _, q_weight, k_weight, _, _ = ctx.saved_tensors
    dq, dk, dweights = _norm_backward(dq, dk, *ctx.saved_tensors, ctx.eps, ctx.interleaved)
    return dq, dk, None, None, dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype)


_forward.register_gradients(_gradients, save=_saved, outputs=2)

# ------------------------------------------------------------------------------------------------- the public function


def rotary(
    q: TensorOrDual, k: TensorOrDual, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[TensorOrDual, TensorOrDual]:
    """Rotary position embedding (arXiv 2104.09864) of queries and keys.

    Each pair of channels (x₁, x₂) of a head becomes (x₁ cos − x₂ sin, x₁ sin + x₂ cos), with the angle of its token and
    pair. Pair i is (x_i, x_{i + d/2}) (GPT-NeoX, LLaMA) or, `interleaved`, (x_{2i}, x_{2i+1}) (RoFormer, EVA,
    LightningDiT). Tokens without a position (class or time tokens) have rows cos = 1, sin = 0. The rotation is linear,
    so tangents are rotated alike; under `torch.func.jvp` or `forward_ad` plain tensors are served too.

    Args:
        q: (B, N, H, d) tensor or Dual, d even; a view with any strides, for instance of a packed qkv projection.
        k: (B, N, H_kv, d).
        cos, sin: (N, d/2) of any float dtype, one row per token; constants, they get no gradient.
        interleaved: the pairing, see above.

    Returns:
        `(q, k)` rotated, contiguous, each of the kind and dtype of its argument.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the requested backend cannot serve the call.
        NotImplementedError: `cos` or `sin` has a tangent.
    """
    check_flag("interleaved", interleaved)
    _check_tables(cos, sin)
    return _rotary(q, k, None, None, cos, sin, 0.0, interleaved)


def qk_norm_rotary(
    q: TensorOrDual,
    k: TensorOrDual,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[TensorOrDual, TensorOrDual]:
    """`rms_norm` of each head of queries and keys (QK-norm, arXiv 2302.05442), then `rotary`, one read and one write.

    Args:
        q: (B, N, H, d) tensor or Dual, d even; a view with any strides, for instance of a packed qkv projection.
        k: (B, N, H_kv, d).
        q_weight, k_weight: (d,), plain multipliers shared by the heads; any float dtype.
        cos, sin: (N, d/2) of any float dtype, one row per token; constants, they get no gradient.
        eps: added to the mean square, >= 0.
        interleaved: which channels are a pair, as in `rotary`.

    Returns:
        `(q, k)` normalised and rotated, contiguous, each of the kind and dtype of its argument.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the requested backend cannot serve the call.
        NotImplementedError: a weight, `cos` or `sin` has a tangent.
    """
    check_flag("interleaved", interleaved)
    _check_tables(cos, sin)
    return _qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, check_number("eps", eps, 0), interleaved)


def _check_tables(*tables: Any) -> None:
    for name, table in zip(("cos", "sin"), tables, strict=True):
        if isinstance(table, Tensor) and table.requires_grad:
            raise ValueError(f"{name}: the rotation's tables are constants; pass it detached")


def _check(
    q: TensorOrDual, k: TensorOrDual, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor
) -> None:
    check_operand("q", q, 4)
    check_operand("k", k, 4)
    check_same("k", k, "q", q)
    B, N, _, d = q.shape
    if d % 2 or d == 0:
        raise ValueError(f"q: expected an even head dim, got shape {tuple(q.shape)}")
    if k.shape[0] != B or k.shape[1] != N or k.shape[3] != d:
        raise ValueError(f"k: expected ({B}, {N}, H_kv, {d}) to match q, got {tuple(k.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_constant(name, table, (N, d // 2), "(N, d/2) of q", q)


def _check_normed(
    q: TensorOrDual, k: TensorOrDual, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> None:
    _check(q, k, None, None, cos, sin)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_constant(name, weight, q.shape[-1:], "(d,) of q", q)


_DECLARED: dict[str, Any] = {
    "operands": ["q", "k"],
    "constants": ["q_weight", "k_weight", "cos", "sin"],
    "reference": reference.rotary,
    "tangent": reference.rotary_tangent,
    "backends": {"triton": Backend(_forward, rows_unsupported)},
    "outputs": ((0,), (1,)),
}
_rotary = DualOp("rotary", check=_check, **_DECLARED)
_qk_norm_rotary = DualOp("qk_norm_rotary", check=_check_normed, **_DECLARED)
