"""Hand-written CUDA attention for Hopper (csrc/attention/): what it serves, and its launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension

HEAD_DIMS = (64, 72, 80, 96, 128)
ALIGNMENT = 8  # elements in the 16 bytes that the copy engine counts in


def unavailable(device: torch.device | None = None) -> str | None:
    """Why the CUDA backend cannot run on `device` (None: on any), and what to do about it; None where it can."""
    why_not = extension.unavailable(device)
    if why_not is not None or device is None:
        return why_not
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) != (9, 0):
        return (
            f"device: expected compute capability 9.0 (Hopper: H100, H200), got {properties.major}.{properties.minor}"
        )
    return None


def unsupported(q: Tensor) -> str | None:
    """Why the kernels cannot serve `q`; None where they can."""
    if q.dtype not in extension.DTYPES:
        return f"q: expected float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"q: expected a head dim of {', '.join(map(str, HEAD_DIMS))}, got {q.shape[-1]}"
    return unavailable(q.device)


def as_boxes(x: Tensor) -> Tensor:
    """x itself where the copy engine can read it in place, else a contiguous copy: an expanded or unaligned tensor."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    in_place = x.stride(-1) == 1 and all(stride > 0 and stride % ALIGNMENT == 0 for stride in strides)
    if in_place and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _described(x: Tensor | None) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    return None if x is None else (x.data_ptr(), tuple(x.shape), x.stride())


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None = None,
    k_dot: Tensor | None = None,
    v_dot: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """o [B, N_q, H, d], its tangent [B_t, N_q, H, d] (None without tangents) and lse [B, H, N_q], natural log.

    q is [B, N_q, H, d]; k and v [B, N_kv, H_kv, d]; each tangent is None (zero) or has the first B_t <= B batch rows.
    Where some tangents are given, those that are not cost as much as if they were.
    """
    B, N_q, H, d = q.shape
    given = [x.shape[0] for x in (q_dot, k_dot, v_dot) if x is not None]
    if len(set(given)) > 1:
        raise ValueError(f"q_dot, k_dot, v_dot: expected the same number of batch rows, got {given}")
    o = torch.empty((B, N_q, H, d), device=q.device, dtype=q.dtype)  # [B, N_q, H, d]
    lse = torch.empty((B, H, N_q), device=q.device, dtype=torch.float32)  # [B, H, N_q]
    o_dot = torch.empty((given[0], N_q, H, d), device=q.device, dtype=q.dtype) if given else None  # [B_t, N_q, H, d]
    if o.numel() == 0:
        return o, o_dot, lse
    primals = tuple(as_boxes(x) for x in (q, k, v))
    dots: tuple[Tensor | None, ...] = (None, None, None)
    if given and given[0] > 0:
        pairs = zip((q, k, v), (q_dot, k_dot, v_dot), strict=True)
        dots = tuple(
            torch.zeros((given[0], *x.shape[1:]), device=x.device, dtype=x.dtype) if x_dot is None else as_boxes(x_dot)
            for x, x_dot in pairs
        )
    with extension.launching(q.device) as where:
        extension.load().attention_forward(
            dtype=extension.DTYPES[q.dtype],
            q=_described(primals[0]),
            k=_described(primals[1]),
            v=_described(primals[2]),
            q_dot=_described(dots[0]),
            k_dot=_described(dots[1]),
            v_dot=_described(dots[2]),
            o=o.data_ptr(),
            o_dot=0 if o_dot is None else o_dot.data_ptr(),
            lse=lse.data_ptr(),
            scale=scale,
            causal=causal,
            **where,
        )
    return o, o_dot, lse
