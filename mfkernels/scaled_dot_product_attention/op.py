from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..attention import attention
from ..checks import check_operand
from ..dual import TensorOrDual, linear_map


def scaled_dot_product_attention(
    query: TensorOrDual,
    key: TensorOrDual,
    value: TensorOrDual,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> TensorOrDual:
    """`torch.nn.functional.scaled_dot_product_attention` with a forward-mode rule: a drop-in where there is no mask.

    `mfkernels.attention` in PyTorch's layout and with PyTorch's arguments. Right on tensors, under `torch.func.jvp` and
    `forward_ad`, on `Dual`s and inside a module that was dualized, eager and compiled. Tangents are constants for
    reverse mode.

    Args:
        query: (B, H, N_q, d) tensor or Dual.
        key, value: (B, H_kv, N_kv, d); H_kv = H, or a divisor of H with `enable_gqa`.
        attn_mask, dropout_p: None and 0; anything else is refused.
        is_causal: query i sees keys j <= i only.
        scale: factor on the scores, any finite number; default d^(-1/2).
        enable_gqa: let several heads of `query` share one of `key` and `value`.

    Returns:
        (B, H, N_q, d); a Dual if any argument is one.

    Raises:
        BackendError: the requested backend cannot serve the call.
        NotImplementedError: there is a mask or dropout.
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask: expected None: masked attention has no tangent rule here (is_causal=True has); "
            "torch.nn.functional.scaled_dot_product_attention takes masks"
        )
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p: expected 0: attention dropout has no tangent rule here, got {dropout_p}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_operand(name, x, 4)
    if not enable_gqa and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key: expected the {query.shape[1]} heads of query, got shape {tuple(key.shape)}; enable_gqa=True lets "
            "heads share keys"
        )
    if value.shape != key.shape or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key, value: expected one shape and the head dim of query, {query.shape[3]}, got {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )
    q, k, v = (linear_map(lambda a: a.transpose(1, 2), x) for x in (query, key, value))  # [B, N, H, d]
    o = attention(q, k, v, scale=scale, is_causal=is_causal)  # [B, N_q, H, d]
    return linear_map(lambda a: a.transpose(1, 2), o)  # [B, H, N_q, d]


class _Swap(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@contextmanager
def patch_sdpa() -> Iterator[None]:
    """Serve PyTorch's `scaled_dot_product_attention` by ours in the block, for a model that cannot be edited.

    It acts on what the block calls in this thread, however the function was imported, and on nothing outside it.
    """
    with _Swap():
        yield
