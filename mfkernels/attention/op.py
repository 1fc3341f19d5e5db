from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backend import BackendError, requested_part, triton_unsupported
from ..checks import autocast_enabled, check_flag, check_number, check_operand, check_same
from ..dual import TensorOrDual, linear_map
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..products import without_autocast
from ..router import Backend, DualOp
from . import cuda, reference
from .backward import attention_backward_by, by_length, choose_backward

# ------------------------------------------------------------------------------------------- operators and their rules


@operator("attention_forward")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    scale: float,
    is_causal: bool,
    backend: str = "triton",
    backward: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, N_q, H, d), its tangent (B_t, N_q, H, d) with B_t = 0 where there is none, and lse (B, H, N_q) float32.

    `backward` names the kernels that the backward of this call will take.
    """
    operands = (q, k, v, q_dot, k_dot, v_dot)
    if backend == "cuda":
        o, o_dot, lse = cuda.attention_forward(*operands, scale=scale, causal=is_causal)
    else:
        from .kernels import attention_forward

        precision = product_precision(q)
        o, o_dot, lse = attention_forward(*operands, scale=scale, causal=is_causal, precision=precision)
    return o, tangent_or_empty(o_dot, o), lse


@forward.register_fake
def _(q, k, v, q_dot, k_dot, v_dot, scale, is_causal, backend="triton", backward="triton"):  # type: ignore[no-untyped-def]
    B, N_q, H, _d = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((num_tangent_rows(q_dot, k_dot, v_dot), *q.shape[1:])),
        q.new_empty((B, H, N_q), dtype=torch.float32),
    )


@operator("attention_backward", outputs_like=("q", "k", "v"))
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    backward: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    if backward == "by-length":
        backward = by_length(q, k, causal=is_causal)
    if backward != "triton":
        return attention_backward_by(backward, do, q, k, v, o, lse, scale=scale, causal=is_causal)
    from .backward_kernels import attention_backward

    return attention_backward(do, q, k, v, o, lse, scale=scale, causal=is_causal, precision=product_precision(q))


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, _, _, _, ctx.scale, ctx.is_causal, _, ctx.backward = inputs
    o, _, lse = output
    return q, k, v, o, lse


forward.register_gradients(
    lambda ctx, do: _backward(do, *ctx.saved_tensors, ctx.scale, ctx.is_causal, ctx.backward), save=_saved
)


def product_precision(q: Tensor) -> str:
    """Products of float32 operands are exact unless the user asked PyTorch for TF32."""
    if q.dtype != torch.float32:
        return "ieee"
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch 2.9; the older question then raises
    if asked is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if asked == "tf32" else "ieee"


# --------------------------------------------------------------------------------------------------- what serves a call

MAX_HEAD_DIM = 256


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot serve these arguments, naming the one at fault; None where they can."""
    reason = triton_unsupported(q=q)
    if reason is not None:
        return reason
    step = 16 // q.dtype.itemsize  # rows load 16 bytes at a time
    d = q.shape[-1]
    if d % step or not 8 <= d <= MAX_HEAD_DIM:
        return f"q: expected a head dim that is a multiple of {step} up to {MAX_HEAD_DIM} in {q.dtype}, got {d}"
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return "q: Triton's CPU interpreter gets bfloat16 products wrong; expected float16 or float32 there"
    return None


def backward_of(backend: str, q: Tensor, k: Tensor, *, is_causal: bool) -> str:
    """The kernels of the backward of a call that `backend` serves, for operands as the kernels get them.

    Not cached: it depends on PyTorch's settings too.
    """
    requested = requested_part("attention_backward")
    # whether there will be a backward is not known: under torch.func.jvp no tensor requires grad
    if requested is None or not torch.is_grad_enabled():
        return "triton"
    if backend == "reference":
        reason = (
            f"attention_backward={requested} is of the triton and cuda forwards, and the reference serves this call: "
            "ask for one of them too (their message says what they cannot do), or leave it out"
        )
        raise BackendError(f"attention: {reason}", "attention_backward", requested, reason)
    return choose_backward(requested, q, k, causal=is_causal)


def _wrapper(
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, *rest: Any, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`rest`: the tangents, scale and is_causal."""
    return forward(q, k, v, *rest, backend, backward_of(backend, q, k, is_causal=rest[-1]))


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> Tensor:
    backward_of("reference", q, k, is_causal=is_causal)  # raises if one is requested
    return reference.attention(q, k, v, scale, is_causal)


def _reference_tangent(q: Tensor, *rest: Any) -> Tensor:
    with without_autocast(q.device):
        return reference.attention_tangent(q, *rest)


# ------------------------------------------------------------------------------------------------- the public function


def attention(
    q: TensorOrDual, k: TensorOrDual, v: TensorOrDual, *, scale: float | None = None, is_causal: bool = False
) -> TensorOrDual:
    """Softmax attention, O = softmax(scale·QKᵀ) V, and its tangent in the same call.

    Under `torch.func.jvp` or `torch.autograd.forward_ad` (plain tensors, no Duals) the tangent is computed by the same
    rule. It is a constant for reverse mode, as a Dual's is: asking for a gradient through it is an error. The tangent
    rule is derived in README.md beside this file.

    Args:
        q: (B, N_q, H, d) tensor or Dual; a view with any strides.
        k, v: (B, N_kv, H_kv, d), H_kv divides H (grouped-query attention when smaller), N_kv >= 1.
        scale: factor on the scores, any finite number; default d^(-1/2).
        is_causal: query i sees keys j <= i only (top-left aligned when N_q differs from N_kv, as in PyTorch's SDPA).

    Returns:
        (B, N_q, H, d); a Dual if any argument is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the requested backend cannot serve the call.
    """
    if scale is not None:
        scale = check_number("scale", scale)
    check_flag("is_causal", is_causal)
    return _attention(q, k, v, scale, is_causal)


def _check(q: TensorOrDual, k: TensorOrDual, v: TensorOrDual) -> None:
    for name, a in (("q", q), ("k", k), ("v", v)):
        check_operand(name, a, 4)
        check_same(name, a, "q", q)
        if (a.dtype == torch.float64) != (q.dtype == torch.float64):
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {a.dtype}; autocast leaves float64 alone")
    B, _, H, d = q.shape
    if d == 0:
        raise ValueError(f"q: expected a head dim of at least 1, got shape {tuple(q.shape)}")
    if k.shape[0] != B or k.shape[3] != d or k.shape[2] == 0 or H % k.shape[2] != 0:
        raise ValueError(f"k: expected ({B}, N_kv, a divisor of {H}, {d}) to match q, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[1] == 0:
        raise ValueError("k: expected at least one key (N_kv >= 1), got none: softmax over an empty set is undefined")


def _prepare(
    q: TensorOrDual, k: TensorOrDual, v: TensorOrDual, scale: float | None, is_causal: bool
) -> tuple[TensorOrDual, TensorOrDual, TensorOrDual, float, bool]:
    """Operands in autocast's dtype, as PyTorch's own attention has them, and a positive scale."""
    if autocast_enabled(q.device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (linear_map(lambda a: a.to(dtype), x) for x in (q, k, v))
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif scale <= 0:  # masked scores are -inf before they are scaled, in the kernels and in PyTorch's
        sign, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)
        q = linear_map(lambda a: a * sign, q)
    return q, k, v, scale, is_causal


_attention = DualOp(
    "attention",
    ["q", "k", "v"],
    check=_check,
    reference=_reference,
    tangent=_reference_tangent,
    backends={
        "triton": Backend(forward, unsupported, wrapper=partial(_wrapper, backend="triton")),
        # right on an H100, and not timed yet
        "cuda": Backend(
            forward, lambda q, k, v: cuda.unsupported(q), opt_in=True, wrapper=partial(_wrapper, backend="cuda")
        ),
    },
    prepare=_prepare,
)


def choose_backends(x: Tensor) -> tuple[str, str]:
    """The backends of forward and backward for q, k and v that are all like `x`, (B, N, H, d), without a mask."""
    backend = _attention.choose(q=x, k=x, v=x)
    return backend, backward_of(backend, x, x, is_causal=False)
