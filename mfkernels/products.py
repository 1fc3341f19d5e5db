"""What the ops that hold a matrix product share: under autocast they cast by themselves.

Autocast's own cast of a weight rounds its gradient as well: the product writes it in bfloat16, another pass makes it
float32. Here the product writes what it has added up, in the weight's dtype.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .checks import autocast_enabled
from .dual import TensorOrDual


def product_dtype(x: TensorOrDual) -> torch.dtype:
    """The dtype of a product of `x` with a weight: autocast's where it is on, as of PyTorch's own products."""
    if x.dtype != torch.float64 and autocast_enabled(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For a backward, whose operands have their dtypes; a forward's are in autocast's, which leaves them alone."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else _AS_IT_IS


_AS_IT_IS = nullcontext()


_CASTS = {torch.bfloat16: Tensor.bfloat16, torch.float16: Tensor.half, torch.float32: Tensor.float}


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype:
        return x
    cast = _CASTS.get(dtype)  # `to` takes half as long again
    return x.to(dtype) if cast is None else cast(x)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dyᵀ x [D_out, D_in] in `dtype`, of dy [M, D_out] and x [M, D_in]."""
    plainly = dy.dtype == dtype or dtype != torch.float32 or torch.is_grad_enabled()  # the other has no derivative
    if not plainly and writes_float32(dy.device):
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return in_dtype(torch.mm(dy.t(), x), dtype)


def writes_float32(device: torch.device) -> bool:
    """Whether a product of narrower operands can be written in float32: cuBLAS's can, from torch 2.8 on."""
    return device.type == "cuda" and _VERSION >= (2, 8)


_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
