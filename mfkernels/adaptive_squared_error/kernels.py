"""Triton adaptive squared error: target, error, per-sample sum, weight and what the gradient needs, in one pass.

A sample of up to CHUNK numbers is one program and one launch; larger ones are cut, and a second launch adds the parts.
"""

# mypy: allow-untyped-defs

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, launch_config
from ..rowwise import contiguous


@triton.jit
def _weight(squared_error, eps, P: tl.constexpr):
    """(e + ε)^(−p); the powers in use need no logarithm."""
    base = squared_error + eps
    if P == 0.0:
        weight = base * 0.0 + 1.0
    elif P == 1.0:
        weight = 1.0 / base
    elif P == 0.5:
        weight = 1.0 / tl.sqrt(base)
    else:
        weight = tl.exp(-P * tl.log(base))
    return weight


@triton.jit
def _adaptive_squared_error_forward_kernel(
    u_ptr,
    v_ptr,
    correction_ptr,
    interval_ptr,
    error_ptr,
    loss_ptr,
    squared_error_ptr,
    weight_ptr,
    partials_ptr,
    eps,
    B_t,
    SIZE,
    CHUNKS,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one sample of [B, SIZE]; loss, squared_error and weight [B] here where there is one chunk only."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    first = (tl.program_id(0) % CHUNKS) * CHUNK
    size_corrected = tl.where(b < B_t, SIZE, 0)  # rows past B_t have no correction
    if correction_ptr is not None:
        interval = tl.load(interval_ptr + b, mask=b < B_t, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    for start in range(0, tl.minimum(CHUNK, SIZE - first), BLOCK):
        cols = first + start + tl.arange(0, BLOCK)  # [BLOCK]
        mask = cols < SIZE  # [BLOCK]
        offs = b * SIZE + cols  # [BLOCK]
        u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        target = tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        if correction_ptr is not None:
            correction = tl.load(correction_ptr + offs, mask=cols < size_corrected, other=0.0).to(tl.float32)  # [BLOCK]
            target -= interval * correction
        error = u - target  # [BLOCK]
        total += error * error
        if error_ptr is not None:
            tl.store(error_ptr + offs, error.to(error_ptr.dtype.element_ty), mask=mask)
    squared_error = tl.sum(total, 0)
    if partials_ptr is not None:
        tl.store(partials_ptr + tl.program_id(0), squared_error)
    else:
        weight = _weight(squared_error, eps, P)
        tl.store(loss_ptr + b, weight * squared_error)
        tl.store(squared_error_ptr + b, squared_error)
        tl.store(weight_ptr + b, weight)


@triton.jit
def _adaptive_squared_error_finish_kernel(
    partials_ptr,
    loss_ptr,
    squared_error_ptr,
    weight_ptr,
    eps,
    CHUNKS,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chunks [B, CHUNKS] of one sample added up, always in the same order."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    for start in range(0, CHUNKS, BLOCK):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        total += tl.load(partials_ptr + b * CHUNKS + cols, mask=cols < CHUNKS, other=0.0)
    squared_error = tl.sum(total, 0)
    weight = _weight(squared_error, eps, P)
    tl.store(loss_ptr + b, weight * squared_error)
    tl.store(squared_error_ptr + b, squared_error)
    tl.store(weight_ptr + b, weight)


@triton.jit
def _adaptive_squared_error_backward_kernel(
    dloss_ptr,
    error_ptr,
    weight_ptr,
    du_ptr,
    stride_dloss,
    SIZE,
    CHUNKS,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """du = 2·dloss·weight·(u − target); the weight is a constant (stop-gradient)."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    first = (tl.program_id(0) % CHUNKS) * CHUNK
    factor = 2.0 * tl.load(dloss_ptr + b * stride_dloss) * tl.load(weight_ptr + b)
    for start in range(0, tl.minimum(CHUNK, SIZE - first), BLOCK):
        cols = first + start + tl.arange(0, BLOCK)  # [BLOCK]
        mask = cols < SIZE  # [BLOCK]
        offs = b * SIZE + cols  # [BLOCK]
        error = tl.load(error_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        tl.store(du_ptr + offs, (factor * error).to(du_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------- launchers


def forward_launch(
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    interval: Tensor | None,
    error: Tensor | None,
    loss: Tensor,
    squared_error: Tensor,
    weight: Tensor,
    partials: Tensor | None,
    *,
    p: float,
    eps: float,
    config: Mapping[str, int],
) -> Launch:
    """The launch that fills error and, without partials, the three [B]; with them, partials [B, chunks]."""
    B, SIZE = u.shape[0], u[0].numel()
    CHUNKS = 1 if partials is None else partials.shape[1]
    return Launch(
        _adaptive_squared_error_forward_kernel,
        lambda config: (B * CHUNKS,),
        config,
        u.device,
        u_ptr=u,
        v_ptr=v,
        correction_ptr=correction,
        interval_ptr=interval,
        error_ptr=error,
        loss_ptr=loss,
        squared_error_ptr=squared_error,
        weight_ptr=weight,
        partials_ptr=partials,
        eps=eps,
        B_t=0 if correction is None else correction.shape[0],
        SIZE=SIZE,
        CHUNKS=CHUNKS,
        P=p,
    )


def finish_launch(
    partials: Tensor,
    loss: Tensor,
    squared_error: Tensor,
    weight: Tensor,
    *,
    p: float,
    eps: float,
) -> Launch:
    B, CHUNKS = partials.shape
    return Launch(
        _adaptive_squared_error_finish_kernel,
        lambda config: (B,),
        {"BLOCK": 128, "num_warps": 1, "num_stages": 1},
        loss.device,
        partials_ptr=partials,
        loss_ptr=loss,
        squared_error_ptr=squared_error,
        weight_ptr=weight,
        eps=eps,
        CHUNKS=CHUNKS,
        P=p,
    )


def error_forward(
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    interval: Tensor | None,
    *,
    p: float,
    eps: float,
    with_error: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """loss, squared error and weight [B] in float32; u − target [B, …] in the dtype of u where it is asked for."""
    B = u.shape[0]
    error = torch.empty(u.shape, device=u.device, dtype=u.dtype) if with_error else None  # [B, …]
    loss, squared_error, weight = (torch.empty(B, device=u.device, dtype=torch.float32) for _ in range(3))  # [B]
    if B == 0:
        return loss, squared_error, weight, error
    config = launch_config("adaptive_squared_error", u.device, u.dtype)
    chunks = cdiv(u[0].numel(), config["CHUNK"])
    partials = torch.empty((B, chunks), device=u.device, dtype=torch.float32) if chunks > 1 else None  # [B, chunks]
    launch = forward_launch(
        u.contiguous(),
        v.contiguous(),
        contiguous(correction),
        contiguous(interval),
        error,
        loss,
        squared_error,
        weight,
        partials,
        p=p,
        eps=eps,
        config=config,
    )
    launch.run()
    if partials is not None:
        finish_launch(partials, loss, squared_error, weight, p=p, eps=eps).run()
    return loss, squared_error, weight, error


def backward_launch(
    dloss: Tensor,
    error: Tensor,
    weight: Tensor,
    du: Tensor,
    *,
    config: Mapping[str, int],
) -> Launch:
    B, SIZE = du.shape[0], du[0].numel()
    CHUNKS = cdiv(SIZE, config["CHUNK"])
    return Launch(
        _adaptive_squared_error_backward_kernel,
        lambda config: (B * CHUNKS,),
        config,
        du.device,
        dloss_ptr=dloss,
        error_ptr=error,
        weight_ptr=weight,
        du_ptr=du,
        stride_dloss=dloss.stride(0),
        SIZE=SIZE,
        CHUNKS=CHUNKS,
    )


def error_backward(dloss: Tensor, error: Tensor, weight: Tensor) -> Tensor:
    """du [B, …]; dloss [B] of any stride (a mean's is expanded)."""
    du = torch.empty(error.shape, device=error.device, dtype=error.dtype)  # [B, …]
    if du.numel():
        backward_launch(
            dloss, error, weight, du, config=launch_config("adaptive_squared_error", du.device, du.dtype)
        ).run()
    return du
