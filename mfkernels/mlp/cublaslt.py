"""cuBLASLt's products that end in GELU or in its derivative, by `mfkernels._C` and the library that PyTorch brings.

Right on an H100 and not timed there yet, so it serves calls that ask for it (mlp=cublaslt). The tests run it on a CPU
against a library of the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

ALIGNMENT = 8  # elements in the 16 bytes that the fused products count in
WORKSPACE = 32 * 2**20  # bytes; what cuBLAS recommends for Hopper


def library() -> str:
    """The file name of the cuBLASLt of this PyTorch."""
    return f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}"


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, and what to do about it; None where it can."""
    if torch.version.cuda is None:
        return "expected a PyTorch with CUDA, whose cuBLASLt it uses"
    return extension.unavailable(device)


def unsupported(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, dtype: torch.dtype) -> str | None:
    """Why it cannot serve an MLP of these, as `mlp` takes them, whose products are of `dtype`; None where it can."""
    if dtype not in extension.DTYPES:
        return f"x: expected float16 or bfloat16, or autocast to one of these, got {dtype}"
    if b1 is None:
        return "b1: expected a bias, got None"
    for name, w in (("w1", w1), ("w2", w2)):
        if not all(size > 0 and size % ALIGNMENT == 0 for size in w.shape):
            return f"{name}: expected sizes that are multiples of {ALIGNMENT}, got {tuple(w.shape)}"
    return unavailable(x.device)


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(h) and h = x Wᵀ + b, both [M, N], of x [M, K], W [N, K] and b [N], all of one dtype."""
    h = torch.empty((x.shape[0], weight.shape[0]), device=x.device, dtype=x.dtype)  # [M, N]
    a = torch.empty_like(h)  # [M, N]
    _run(x, weight, h, bias, a, derivative=False)
    return a, h


def gelu_product_backward(dy: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dh = gelu'(h)∘(dy W) [M, N] and its sum over the rows [N], of dy [M, K], W [K, N] and h [M, N], of one dtype."""
    h = _in_place(h)
    dh, db = torch.empty_like(h), torch.empty(h.shape[1:], device=h.device, dtype=h.dtype)  # [M, N], [N]
    _run(dy, weight, h, db, dh, derivative=True)
    return dh, db


def _run(x: Tensor, weight: Tensor, h: Tensor, bias: Tensor, out: Tensor, *, derivative: bool) -> None:
    if out.numel() == 0:
        if derivative:
            bias.zero_()
        return
    x, weight, bias_in = _in_place(x), _in_place(weight), bias if derivative else _in_place(bias)
    workspace = torch.empty(WORKSPACE, device=x.device, dtype=torch.uint8)
    with extension.launching(x.device) as where:
        extension.load().gelu_product(
            library=library(),
            derivative=derivative,
            dtype=extension.DTYPES[x.dtype],
            sizes=(out.shape[0], out.shape[1], x.shape[1]),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            h=h.data_ptr(),
            bias=bias_in.data_ptr(),
            out=out.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_bytes=WORKSPACE,
            **where,
        )


def _in_place(x: Tensor) -> Tensor:
    """x itself where it is contiguous at an address that 16 divides, else a copy that is."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
