from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..backend import choose, requested_part, triton_unavailable
from ..checks import autocast_enabled, check_flag, check_number, check_operand, check_same, knows_autocast
from ..dual import Dual, TensorOrDual, linear_map, padded_tangent, primal_of, tangent_rows
from ..forward_mode import bridge_forward_mode
from ..operator import operator
from . import cuda, reference
from .backward import attention_backward_by, by_length, choose_backward
from .limits import unsupported

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
    if backend == "cuda":
        o, o_dot, lse = cuda.attention_forward(
            q,
            k,
            v,
            q_dot,
            k_dot,
            v_dot,
            scale=scale,
            causal=is_causal,
        )
    else:
        from .kernels import attention_forward

        o, o_dot, lse = attention_forward(
            q,
            k,
            v,
            q_dot,
            k_dot,
            v_dot,
            scale=scale,
            causal=is_causal,
            precision=product_precision(q),
        )
    return o, o.new_empty((0, *o.shape[1:])) if o_dot is None else o_dot, lse


@forward.register_fake
def _(q, k, v, q_dot, k_dot, v_dot, scale, is_causal, backend="triton", backward="triton"):  # type: ignore[no-untyped-def]
    rows = next((a.shape[0] for a in (q_dot, k_dot, v_dot) if a is not None), 0)
    B, N_q, H, _d = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((rows, *q.shape[1:])),
        q.new_empty((B, H, N_q), dtype=torch.float32),
    )


@operator("attention_backward")
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

    return attention_backward(
        do,
        q,
        k,
        v,
        o,
        lse,
        scale=scale,
        causal=is_causal,
        precision=product_precision(q),
    )


@_backward.register_fake
def _(do, q, k, v, o, lse, scale, is_causal, backward="triton"):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, _, _, _, ctx.scale, ctx.is_causal, _, ctx.backward = inputs
    o, o_dot, lse = output
    ctx.mark_non_differentiable(o_dot, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse)  # nothing of the tangent


def _backward_rule(ctx, do, _do_dot, _dlse):  # type: ignore[no-untyped-def]
    if do is None:
        return (None,) * 10
    q, k, v, o, lse = ctx.saved_tensors
    return *_backward(do, q, k, v, o, lse, ctx.scale, ctx.is_causal, ctx.backward), *(None,) * 7


forward.register_autograd(_backward_rule, setup_context=_setup_context)


def product_precision(q: Tensor) -> str:
    """Products of float32 operands are exact unless the user asked PyTorch for TF32."""
    if q.dtype != torch.float32:
        return "ieee"
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch 2.9; the older question then raises
    if asked is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if asked == "tf32" else "ieee"


# --------------------------------------------------------------------------------------------------- what serves a call


def _triton_unsupported(q: Tensor, k: Tensor, scale: float) -> str | None:
    return unsupported(q, k, scale) or triton_unavailable(q.device)


# ------------------------------------------------------------------------------------------------- the public function


def attention(
    q: TensorOrDual,
    k: TensorOrDual,
    v: TensorOrDual,
    *,
    scale: float | None = None,
    is_causal: bool = False,
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
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    _check(q, k, v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scale = check_number("scale", scale)
    check_flag("is_causal", is_causal)
    # PyTorch's fused attention refuses forward-mode tangents (pytorch#117629), and a custom op drops them
    return bridge_forward_mode("attention", lambda q, k, v: _run(q, k, v, scale, is_causal), q, k, v)


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


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    return torch.autocast(device_type, enabled=False) if knows_autocast(device_type) else nullcontext()


def _autocast(x: TensorOrDual) -> TensorOrDual:
    """What autocast does to the operands of PyTorch's own attention; float64 stays."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return x if x.dtype == torch.float64 else linear_map(lambda a: a.to(dtype), x)


def choose_backends(q: Tensor, k: Tensor, scale: float, *, is_causal: bool) -> tuple[str, str]:
    """The backends of the forward and of the backward of a call."""
    backend = choose(
        "attention",
        q.device,
        {
            "triton": lambda: _triton_unsupported(q, k, scale),
            "cuda": lambda: cuda.unsupported(q, scale),
        },
        on_request=("cuda",),  # it has not run on a GPU yet
    )
    asked = requested_part("attention_backward")
    # whether a gradient will be asked for is not known: under torch.func.jvp no tensor says that it requires one
    if asked is None or not torch.is_grad_enabled():
        return backend, "triton"
    if backend == "reference":
        raise NotImplementedError(
            f"attention: attention_backward={asked} is of the triton and cuda forwards, and the reference serves "
            "this call: ask for one of them too (their message says what they cannot do), or leave it out"
        )
    return backend, choose_backward(asked, q, k, causal=is_causal)


def _run(q: TensorOrDual, k: TensorOrDual, v: TensorOrDual, scale: float, is_causal: bool) -> TensorOrDual:
    if autocast_enabled(q.device):
        q, k, v = (_autocast(a) for a in (q, k, v))
    if scale <= 0:  # masked scores are -inf before they are scaled, in the kernels and in PyTorch's
        sign, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)
        q = linear_map(lambda a: a * sign, q)
    qp, kp, vp = primal_of(q), primal_of(k), primal_of(v)
    dual = any(isinstance(a, Dual) for a in (q, k, v))
    rows = tangent_rows(q, k, v)
    backend, backward = choose_backends(qp, kp, scale, is_causal=is_causal)
    if backend != "reference":
        dots = (None, None, None) if rows is None else tuple(padded_tangent(a, rows) for a in (q, k, v))
        o, o_dot, _ = forward(qp, kp, vp, *dots, scale, is_causal, backend, backward)
        return Dual(o, None if rows is None else o_dot) if dual else o

    o = reference.attention(qp, kp, vp, scale, is_causal)
    if rows is None:
        return Dual(o) if dual else o

    def first(a: Tensor) -> Tensor:
        return a[:rows]

    # the reference chooses its precisions itself
    with torch.no_grad(), _without_autocast(qp.device.type):
        o_dot = reference.attention_tangent(
            q=first(qp),
            k=first(kp),
            v=first(vp),
            q_dot=padded_tangent(q, rows),
            k_dot=padded_tangent(k, rows),
            v_dot=padded_tangent(v, rows),
            scale=scale,
            is_causal=is_causal,
        )
        return Dual(o, o_dot.to(o.dtype))
