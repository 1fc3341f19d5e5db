"""What the attention kernels can be asked for. Imports no Triton: the public function asks before it loads them."""

import math

import torch
from torch import Tensor

from ..backend import unsupported_dtype

MAX_HEAD_DIM = 256


def unsupported(q: Tensor, k: Tensor, scale: float) -> str | None:
    """Why the Triton kernels cannot serve these arguments, naming the one at fault; None where they can."""
    head_dim = q.shape[-1]
    reason = unsupported_dtype("q", q.dtype)
    if reason is not None:
        return reason
    step = 16 // q.dtype.itemsize  # rows load 16 bytes at a time
    if head_dim % step or not 8 <= head_dim <= MAX_HEAD_DIM:
        return f"q: expected a head dim that is a multiple of {step} up to {MAX_HEAD_DIM} in {q.dtype}, got {head_dim}"
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return "q: Triton's CPU interpreter gets bfloat16 products wrong; expected float16 or float32 there"
    if k.shape[1] == 0:
        return "k: expected at least one key, got N_kv = 0"
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        return f"k: expected a number of heads that divides that of q, {q.shape[2]}, got {k.shape[2]}"
    if not 0 < scale < math.inf:
        return f"scale: expected a positive finite number, got {scale}"
    return None
