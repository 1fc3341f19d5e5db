from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_constant, check_operand, check_same
from ..dual import Dual, TensorOrDual, bridge_forward_mode, linear_map
from ..rms_norm.op import check_eps
from . import reference


def rotary(
    q: TensorOrDual,
    k: TensorOrDual,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
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
        NotImplementedError: the backend that was asked for cannot serve the call; `cos` or `sin` has a tangent.
    """
    _check(q, k, cos, sin)
    choose("rotary", q.device, {})

    def run(x: TensorOrDual) -> TensorOrDual:
        return linear_map(lambda a: reference.rotary(a, cos, sin, interleaved), x)

    return bridge_forward_mode("rotary", lambda q, k: (run(q), run(k)), q, k)


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
        NotImplementedError: the backend that was asked for cannot serve the call; a weight, `cos` or `sin` has a
            tangent.
    """
    _check(q, k, cos, sin)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_constant(name, weight, q.shape[-1:], "(d,) of q", q)
    check_eps(eps)
    choose("qk_norm_rotary", q.device, {})

    def run(x: TensorOrDual, weight: Tensor) -> TensorOrDual:
        return _norm_rotary(x, weight, cos, sin, eps, interleaved)

    return bridge_forward_mode("qk_norm_rotary", lambda q, k: (run(q, q_weight), run(k, k_weight)), q, k)


def _check(q: TensorOrDual, k: TensorOrDual, cos: Tensor, sin: Tensor) -> None:
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
        if table.requires_grad:
            raise ValueError(f"{name}: the rotation's tables are constants; pass it detached")


def _norm_rotary(
    x: TensorOrDual,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> TensorOrDual:
    if not isinstance(x, Dual):
        return reference.norm_rotary(x, weight, cos, sin, eps, interleaved)
    y = reference.norm_rotary(x.primal, weight, cos, sin, eps, interleaved)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        first = x.primal[: x.rows]
        y_dot = reference.norm_rotary_tangent(first, weight, x.tangent, cos, sin, eps, interleaved)
        return Dual(y, y_dot.to(y.dtype))
