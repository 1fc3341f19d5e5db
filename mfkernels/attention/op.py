from __future__ import annotations

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from ..backend import choose
from ..checks import check_operand, check_same
from ..dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from . import reference


def attention(
    q: TensorOrDual,
    k: TensorOrDual,
    v: TensorOrDual,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> TensorOrDual:
    """Softmax attention, O = softmax(scale·QKᵀ) V, and its tangent in the same call.

    Under `torch.func.jvp` or `torch.autograd.forward_ad` (no Duals) the tangent is computed by the same rule; it is a
    constant for reverse mode, as a Dual's is. Tangent rule: README.md beside this file.

    Args:
        q: (B, N_q, H, d) tensor or Dual; a view with any strides.
        k, v: (B, N_kv, H_kv, d), H_kv divides H (grouped-query attention when smaller), N_kv >= 1.
        scale: factor on the scores; default d^(-1/2).
        is_causal: query i sees keys j <= i only (top-left aligned when N_q differs from N_kv, as in PyTorch's SDPA).

    Returns:
        (B, N_q, H, d); a Dual if any argument is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choose("attention", q.device, {})
    if any(isinstance(a, Dual) for a in (q, k, v)):
        return _run(q, k, v, scale, is_causal)
    # Plain tensors may carry forward-mode tangents, which PyTorch's fused attention refuses (pytorch#117629).
    q, k, v = _unpacked(q), _unpacked(k), _unpacked(v)
    out = _run(q, k, v, scale, is_causal)
    return fwAD.make_dual(out.primal, out.tangent) if isinstance(out, Dual) else out


def _unpacked(x: TensorOrDual) -> TensorOrDual:
    """A tensor of `torch.func.jvp` or `forward_ad` as a Dual; one without a tangent as it is."""
    p, t = fwAD.unpack_dual(primal_of(x))
    return p if t is None else Dual(p, t.detach())


def _check(q: TensorOrDual, k: TensorOrDual, v: TensorOrDual) -> None:
    for name, a in (("q", q), ("k", k), ("v", v)):
        check_operand(name, a, 4)
        check_same(name, a, "q", q)
    B, _N_q, H, d = q.shape
    if k.shape[0] != B or k.shape[3] != d or k.shape[2] == 0 or H % k.shape[2] != 0:
        raise ValueError(f"k: expected ({B}, N_kv, a divisor of {H}, {d}) to match q, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[1] == 0:
        raise ValueError("k: expected at least one key (N_kv >= 1), got none: softmax over an empty set is undefined")


def _run(q: TensorOrDual, k: TensorOrDual, v: TensorOrDual, scale: float, is_causal: bool) -> TensorOrDual:
    qp, kp, vp = primal_of(q), primal_of(k), primal_of(v)
    o = reference.attention(qp, kp, vp, scale, is_causal)
    if not any(isinstance(a, Dual) for a in (q, k, v)):
        return o
    rows = tangent_rows(q, k, v)
    if rows is None:
        return Dual(o)

    def first(a: Tensor) -> Tensor:
        return a[:rows]

    # the reference chooses its precisions itself
    with torch.no_grad(), torch.autocast(qp.device.type, enabled=False):
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
