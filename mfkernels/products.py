"""What the ops with a matrix product share: under autocast they cast by themselves.

Autocast's own cast of a weight rounds its gradient as well: the product writes it in bfloat16, another pass makes it
float32. Here the product writes its float32 accumulators, in the weight's dtype.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .checks import autocast_dtype, autocast_enabled
from .dual import TensorOrDual

_NO_CONTEXT = nullcontext()
_CASTS = {torch.bfloat16: Tensor.bfloat16, torch.float16: Tensor.half, torch.float32: Tensor.float}
_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def product_dtype(x: TensorOrDual) -> torch.dtype:
    """The dtype of a product of `x` with a weight: autocast's where it is on, as of PyTorch's own products."""
    return autocast_dtype(x.dtype, x.device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off where it is on: for what chooses its dtypes itself."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else _NO_CONTEXT


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype:
        return x
    cast = _CASTS.get(dtype)  # `to` takes half as long again
    return x.to(dtype) if cast is None else cast(x)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dyᵀ x [D_out, D_in] in `dtype`, of dy [M, D_out] and x [M, D_in]."""
    widens = dtype == torch.float32 and dy.dtype != dtype and writes_float32(dy.device)
    if widens and not torch.is_grad_enabled():  # a product with out_dtype has no derivative
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return in_dtype(torch.mm(dy.t(), x), dtype)


def writes_float32(device: torch.device) -> bool:
    """Whether a product of narrower operands can be written in float32: cuBLAS's can, from torch 2.8 on."""
    return device.type == "cuda" and _VERSION >= (2, 8)
