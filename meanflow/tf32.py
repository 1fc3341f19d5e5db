"""TF32: products of float32 numbers that are rounded to 10 bits first, on NVIDIA's tensor cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Whether float32 products and convolutions on a GPU are rounded to TF32; PyTorch by itself rounds convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = getattr(matmul, "fp32_precision", None)  # torch 2.9; where it alone was set, the older question is an error
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"
    convolutions = cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        if newer is not None:
            matmul.fp32_precision = newer
        cudnn.allow_tf32 = convolutions
