"""Triton residual update x + gate·y: output and tangent in one launch; backward without atomics.

The update followed by a norm is one kernel with the norm, in ada_layer_norm/kernels.py.
"""

# mypy: allow-untyped-defs

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, launch_config, with_fitting_chunk
from ..plan import planned
from ..rowwise import (
    block_of,
    contiguous,
    load_row,
    load_rows,
    per_sample,
    store_row,
    store_rows,
    sum_partials,
)


@triton.jit
def _gated_residual_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    x_dot_ptr,
    y_dot_ptr,
    gate_dot_ptr,
    out_ptr,
    out_dot_ptr,
    stride_gate,
    stride_gate_dot,
    B_t,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_TANGENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of tokens of one sample, whose gate stays in registers."""
    chunks = tl.cdiv(N, CHUNK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    gate = load_row(gate_ptr + b * stride_gate, D, BLOCK_D)  # [1, BLOCK_D]
    for start in range(0, tl.minimum(CHUNK, N - chunk * CHUNK), BLOCK_N):
        offs_n = chunk * CHUNK + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N  # [BLOCK_N]
        rows = b * N + offs_n  # [BLOCK_N]
        y = load_rows(y_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        out = load_rows(x_ptr, rows, mask_n, D, BLOCK_D) + gate * y  # [BLOCK_N, BLOCK_D]
        store_rows(out_ptr, rows, mask_n, out, D, BLOCK_D)
        if HAS_TANGENT:  # noqa: SIM102 (a constant, decided before b is compared)
            if b < B_t:
                out_dot = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
                if x_dot_ptr is not None:
                    out_dot = load_rows(x_dot_ptr, rows, mask_n, D, BLOCK_D)
                if y_dot_ptr is not None:
                    out_dot += gate * load_rows(y_dot_ptr, rows, mask_n, D, BLOCK_D)
                if gate_dot_ptr is not None:
                    out_dot += load_row(gate_dot_ptr + b * stride_gate_dot, D, BLOCK_D) * y
                store_rows(out_dot_ptr, rows, mask_n, out_dot, D, BLOCK_D)


@triton.jit
def _gated_residual_backward_kernel(
    dout_ptr,
    y_ptr,
    gate_ptr,
    dy_ptr,
    partials_ptr,
    stride_gate,
    N,
    CHUNKS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk of tokens of one sample; partials of dgate are [B, CHUNKS, D]. The gradient of x is dout itself."""
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    gate = load_row(gate_ptr + b * stride_gate, D, BLOCK_D)  # [1, BLOCK_D]
    dgate = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BLOCK_N, BLOCK_D]
    for start in range(0, tl.minimum(CHUNK, N - chunk * CHUNK), BLOCK_N):
        offs_n = chunk * CHUNK + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N  # [BLOCK_N]
        rows = b * N + offs_n  # [BLOCK_N]
        dout = load_rows(dout_ptr, rows, mask_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        dgate += dout * load_rows(y_ptr, rows, mask_n, D, BLOCK_D)
        store_rows(dy_ptr, rows, mask_n, dout * gate, D, BLOCK_D)
    store_row(partials_ptr + tl.program_id(0).to(tl.int64) * D, tl.sum(dgate, 0), D, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------- launchers


def forward_launch(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    out: Tensor,
    out_dot: Tensor | None,
    *,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills out and out_dot; big tensors contiguous."""
    B, N, D = x.shape
    B_t = 0 if out_dot is None else out_dot.shape[0]
    gate_, stride_gate = per_sample(gate)
    gate_dot, stride_gate_dot = per_sample(gate_dot)
    return Launch(
        _gated_residual_forward_kernel,
        lambda config: (B * cdiv(N, config["CHUNK"]),),
        config or launch_config("gated_residual_forward", x.device, x.dtype, width=D),
        x.device,
        x_ptr=x,
        y_ptr=y,
        gate_ptr=gate_,
        x_dot_ptr=x_dot if B_t else None,
        y_dot_ptr=y_dot if B_t else None,
        gate_dot_ptr=gate_dot if B_t else None,
        out_ptr=out,
        out_dot_ptr=out_dot if B_t else None,
        stride_gate=stride_gate,
        stride_gate_dot=stride_gate_dot,
        B_t=B_t,
        N=N,
        D=D,
        BLOCK_D=block_of(D),
        HAS_TANGENT=B_t > 0,
    )


@planned
def gated_residual_forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """x + gate·y [B, N, D] and its tangent [B_t, N, D]."""
    B, N, D = x.shape
    B_t = next((a.shape[0] for a in (x_dot, y_dot, gate_dot) if a is not None), None)
    out = torch.empty((B, N, D), device=x.device, dtype=dtype)  # [B, N, D]
    out_dot = None if B_t is None else torch.empty((B_t, N, D), device=x.device, dtype=dtype)  # [B_t, N, D]
    if out.numel():
        launch = forward_launch(
            x.contiguous(),
            y.contiguous(),
            gate,
            contiguous(x_dot),
            contiguous(y_dot),
            gate_dot,
            out,
            out_dot,
        )
        launch.run()
    return out, out_dot


def backward_launch(
    dout: Tensor,
    y: Tensor,
    gate: Tensor,
    dy: Tensor,
    partials: Tensor,
    *,
    config: Mapping[str, int],
) -> Launch:
    """The launch that fills dy and partials [B, chunks of config["CHUNK"] tokens, D]."""
    B, N, D = y.shape
    chunks = partials.shape[1]
    gate_, stride_gate = per_sample(gate)
    return Launch(
        _gated_residual_backward_kernel,
        lambda config: (B * chunks,),
        config,
        y.device,
        dout_ptr=dout,
        y_ptr=y,
        gate_ptr=gate_,
        dy_ptr=dy,
        partials_ptr=partials,
        stride_gate=stride_gate,
        N=N,
        CHUNKS=chunks,
        D=D,
        BLOCK_D=block_of(D),
    )


@planned
def gated_residual_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dy [B, N, D] and dgate [B, D]."""
    B, N, D = y.shape
    dy = torch.empty((B, N, D), device=y.device, dtype=y.dtype)  # [B, N, D]
    if dy.numel() == 0:
        return dy, torch.zeros((B, D), device=gate.device, dtype=gate.dtype)
    config = launch_config("gated_residual_backward", y.device, y.dtype, width=D)
    config = with_fitting_chunk(config, y.device, B, N)
    chunks = cdiv(N, config["CHUNK"])
    dtype = gate.dtype if chunks == 1 else torch.float32
    partials = torch.empty((B, chunks, D), device=y.device, dtype=dtype)  # [B, chunks, D]
    backward_launch(dout.contiguous(), y.contiguous(), gate, dy, partials, config=config).run()
    return dy, partials.view(B, D) if chunks == 1 else sum_partials(partials, gate.dtype)
