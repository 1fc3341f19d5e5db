"""Triton timestep embedding: [cos(tω), sin(tω)] and its tangent in one launch; the gradient of t."""

# mypy: allow-untyped-defs

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, launch_config, next_power_of_2
from ..plan import planned


@triton.jit
def _angles(t_ptr, offs_b, mask_b, log_step, BLOCK_H: tl.constexpr):
    """The rows' tω and ω, [BLOCK_B, BLOCK_H] and [1, BLOCK_H]."""
    omega = tl.exp(-log_step * tl.arange(0, BLOCK_H).to(tl.float32))[None, :]  # [1, BLOCK_H]
    t = tl.load(t_ptr + offs_b, mask=mask_b, other=0.0).to(tl.float32)  # [BLOCK_B]
    return t[:, None] * omega, omega


@triton.jit
def _timestep_embedding_forward_kernel(
    t_ptr,
    t_dot_ptr,
    out_ptr,
    out_dot_ptr,
    log_step,
    B,
    B_t,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    offs_h = tl.arange(0, BLOCK_H)[None, :]  # [1, BLOCK_H]
    angle, omega = _angles(t_ptr, offs_b, offs_b < B, log_step, BLOCK_H)
    cos, sin = tl.cos(angle), tl.sin(angle)  # [BLOCK_B, BLOCK_H] both
    offs = offs_b.to(tl.int64)[:, None] * (2 * HALF) + offs_h  # [BLOCK_B, BLOCK_H]
    mask = (offs_b[:, None] < B) & (offs_h < HALF)  # [BLOCK_B, BLOCK_H]
    tl.store(out_ptr + offs, cos.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offs + HALF, sin.to(out_ptr.dtype.element_ty), mask=mask)
    if t_dot_ptr is not None:
        t_dot = tl.load(t_dot_ptr + offs_b, mask=offs_b < B_t, other=0.0).to(tl.float32)  # [BLOCK_B]
        rate = t_dot[:, None] * omega  # [BLOCK_B, BLOCK_H]
        mask_t = mask & (offs_b[:, None] < B_t)  # [BLOCK_B, BLOCK_H]
        tl.store(out_dot_ptr + offs, (-rate * sin).to(out_dot_ptr.dtype.element_ty), mask=mask_t)
        tl.store(out_dot_ptr + offs + HALF, (rate * cos).to(out_dot_ptr.dtype.element_ty), mask=mask_t)


@triton.jit
def _timestep_embedding_backward_kernel(
    dout_ptr, t_ptr, dt_ptr, log_step, B, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr
):
    offs_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    offs_h = tl.arange(0, BLOCK_H)[None, :]  # [1, BLOCK_H]
    angle, omega = _angles(t_ptr, offs_b, offs_b < B, log_step, BLOCK_H)
    offs = offs_b.to(tl.int64)[:, None] * (2 * HALF) + offs_h  # [BLOCK_B, BLOCK_H]
    mask = (offs_b[:, None] < B) & (offs_h < HALF)  # [BLOCK_B, BLOCK_H]
    dcos = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
    dsin = tl.load(dout_ptr + offs + HALF, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
    dt = tl.sum(omega * (dsin * tl.cos(angle) - dcos * tl.sin(angle)), 1)  # [BLOCK_B]
    tl.store(dt_ptr + offs_b, dt.to(dt_ptr.dtype.element_ty), mask=offs_b < B)


# ----------------------------------------------------------------------------------------------------------- launchers


def forward_launch(
    t: Tensor,
    t_dot: Tensor | None,
    out: Tensor,
    out_dot: Tensor | None,
    *,
    max_period: float,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills out [B, dim] and out_dot [B_t, dim]."""
    B, dim = out.shape
    B_t = 0 if t_dot is None else t_dot.shape[0]
    HALF = dim // 2
    return Launch(
        _timestep_embedding_forward_kernel,
        lambda config: (cdiv(B, config["BLOCK_B"]),),
        config or launch_config("timestep_embedding", t.device, t.dtype, width=dim),
        t.device,
        t_ptr=t,
        t_dot_ptr=t_dot if B_t else None,
        out_ptr=out,
        out_dot_ptr=out_dot if B_t else None,
        log_step=math.log(max_period) / HALF,
        B=B,
        B_t=B_t,
        HALF=HALF,
        BLOCK_H=next_power_of_2(HALF),
    )


@planned
def embedding_forward(t: Tensor, t_dot: Tensor | None, dim: int, max_period: float) -> tuple[Tensor, Tensor | None]:
    """[B, dim] and its tangent [B_t, dim]."""
    out = torch.empty((t.shape[0], dim), device=t.device, dtype=t.dtype)  # [B, dim]
    out_dot = None
    if t_dot is not None:
        t_dot = t_dot.contiguous()
        out_dot = torch.empty((t_dot.shape[0], dim), device=t.device, dtype=t.dtype)  # [B_t, dim]
    if out.numel():
        forward_launch(t.contiguous(), t_dot, out, out_dot, max_period=max_period).run()
    return out, out_dot


def backward_launch(
    dout: Tensor, t: Tensor, dt: Tensor, *, max_period: float, config: Mapping[str, int] | None = None
) -> Launch:
    B, dim = dout.shape
    HALF = dim // 2
    return Launch(
        _timestep_embedding_backward_kernel,
        lambda config: (cdiv(B, config["BLOCK_B"]),),
        config or launch_config("timestep_embedding", t.device, t.dtype, width=dim),
        t.device,
        dout_ptr=dout,
        t_ptr=t,
        dt_ptr=dt,
        log_step=math.log(max_period) / HALF,
        B=B,
        HALF=HALF,
        BLOCK_H=next_power_of_2(HALF),
    )


@planned
def embedding_backward(dout: Tensor, t: Tensor, max_period: float) -> Tensor:
    """dt [B]."""
    dt = torch.empty(t.shape, device=t.device, dtype=t.dtype)  # [B]
    if dt.numel():
        backward_launch(dout.contiguous(), t.contiguous(), dt, max_period=max_period).run()
    return dt
