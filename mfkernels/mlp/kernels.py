"""Triton GELU (tanh form) between an MLP's two products: bias, activation and tangent in one launch; backward.

a = h·s with s = σ(2w), w = √(2/π)(h + 0.044715 h³), h = x W₁ᵀ + b₁;  a' = s + 2 h s (1 − s) w'.
The backward makes a again from what the first product left, so that only that is kept.
"""

# mypy: allow-untyped-defs

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, cdiv, launch_config, with_fitting_chunk
from ..plan import planned
from ..rowwise import sum_partials

CUBIC: tl.constexpr = tl.constexpr(0.044715)
TWO_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)


@triton.jit
def gelu_and_slope(h):
    """a and a' at h. s and 1 − s share one exponential and one division, and neither cancels.

    Past ±9 s is 1 or 2e-29, and h³ may overflow.
    """
    g = tl.minimum(tl.maximum(h, -9.0), 9.0)
    w2 = TWO_SQRT_2_OVER_PI * g * (1.0 + CUBIC * g * g)
    e = tl.exp(-tl.abs(w2))
    larger = 1.0 / (1.0 + e)  # σ(|2w|)
    smaller = e * larger  # σ(−|2w|)
    s = tl.where(w2 >= 0, larger, smaller)
    slope = s + g * (larger * smaller) * TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * g * g)
    return h * s, slope


@triton.jit
def _gelu_forward_kernel(
    h_ptr,
    bias_ptr,
    h_dot_ptr,
    a_ptr,
    a_dot_ptr,
    M,
    M_t,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """h [M, H] before its bias; h_dot and a_dot have the first M_t rows."""
    blocks = tl.cdiv(H, BLOCK_H)
    cols = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    start_m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask = (rows[:, None] < M) & (cols[None, :] < H)  # [BLOCK_M, BLOCK_H]
    offs = rows[:, None] * H + cols[None, :]  # [BLOCK_M, BLOCK_H]
    h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
    if bias_ptr is not None:
        h += tl.load(bias_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]
    a, slope = gelu_and_slope(h)  # [BLOCK_M, BLOCK_H] both
    if a_ptr is not None:
        tl.store(a_ptr + offs, a.to(a_ptr.dtype.element_ty), mask=mask)
    if h_dot_ptr is not None:  # noqa: SIM102 (a constant, decided before the rows are compared)
        if start_m < M_t:
            mask_t = mask & (rows[:, None] < M_t)  # [BLOCK_M, BLOCK_H]
            h_dot = tl.load(h_dot_ptr + offs, mask=mask_t, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
            tl.store(a_dot_ptr + offs, (slope * h_dot).to(a_dot_ptr.dtype.element_ty), mask=mask_t)


@triton.jit
def _gelu_backward_kernel(
    h_ptr,
    bias_ptr,
    da_ptr,
    a_ptr,
    dh_ptr,
    partials_ptr,
    M,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A chunk of rows and a block of columns: a and dh [M, H], and the chunk's share of the bias gradient."""
    blocks = tl.cdiv(H, BLOCK_H)
    cols = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first = chunk * CHUNK
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_H]
        dbias = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)  # [BLOCK_M, BLOCK_H]
    for start in range(0, tl.minimum(CHUNK, M - first).to(tl.int32), BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (rows[:, None] < M) & (cols[None, :] < H)  # [BLOCK_M, BLOCK_H]
        offs = rows[:, None] * H + cols[None, :]  # [BLOCK_M, BLOCK_H]
        h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
        da = tl.load(da_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_H]
        if bias_ptr is not None:
            h += bias
        a, slope = gelu_and_slope(h)  # [BLOCK_M, BLOCK_H] both
        dh = slope * da  # [BLOCK_M, BLOCK_H]
        tl.store(a_ptr + offs, a.to(a_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + offs, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if bias_ptr is not None:
            dbias += dh
    if bias_ptr is not None:
        tl.store(partials_ptr + chunk * H + cols, tl.sum(dbias, 0), mask=cols < H)


# ----------------------------------------------------------------------------------------------------------- launchers


def forward_launch(
    h: Tensor,
    bias: Tensor | None,
    h_dot: Tensor | None,
    a: Tensor | None,
    a_dot: Tensor | None,
    *,
    config: Mapping[str, int] | None = None,
) -> Launch:
    """The launch that fills a [M, H] and a_dot [M_t, H], where they are given; all contiguous."""
    M, H = h.shape
    M_t = 0 if h_dot is None else h_dot.shape[0]
    return Launch(
        _gelu_forward_kernel,
        lambda config: (cdiv(M, config["BLOCK_M"]) * cdiv(H, config["BLOCK_H"]),),
        config or launch_config("gelu_forward", h.device, h.dtype, width=H),
        h.device,
        h_ptr=h,
        bias_ptr=bias,
        h_dot_ptr=h_dot if M_t else None,
        a_ptr=a,
        a_dot_ptr=a_dot if M_t else None,
        M=M,
        M_t=M_t,
        H=H,
    )


@planned
def gelu_forward(h: Tensor, bias: Tensor | None, h_dot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """gelu(h + bias), of the shape and dtype of h [M, H], and its tangent [M_t, H]."""
    h, h_dot = h.contiguous(), None if h_dot is None else h_dot.contiguous()
    a = torch.empty_like(h)  # [M, H]
    a_dot = None if h_dot is None else torch.empty_like(h_dot)  # [M_t, H]
    if h.numel():
        forward_launch(h, None if bias is None else bias.contiguous(), h_dot, a, a_dot).run()
    return a, a_dot


@planned
def gelu_tangent(h: Tensor, h_dot: Tensor) -> Tensor:
    """gelu'(h)∘ḣ alone, of the first M_t rows of h [M, H] and of ḣ [M_t, H]."""
    h, h_dot = h[: h_dot.shape[0]].contiguous(), h_dot.contiguous()
    a_dot = torch.empty_like(h_dot)  # [M_t, H]
    if h_dot.numel():
        forward_launch(h, None, h_dot, None, a_dot).run()
    return a_dot


def backward_launch(
    h: Tensor,
    bias: Tensor | None,
    da: Tensor,
    a: Tensor,
    dh: Tensor,
    partials: Tensor | None,
    *,
    config: Mapping[str, int],
) -> Launch:
    """The launch that fills a and dh [M, H] and, with a bias, partials [chunks of config["CHUNK"] rows, H]."""
    M, H = h.shape
    return Launch(
        _gelu_backward_kernel,
        lambda config: (cdiv(M, config["CHUNK"]) * cdiv(H, config["BLOCK_H"]),),
        config,
        h.device,
        h_ptr=h,
        bias_ptr=bias,
        da_ptr=da,
        a_ptr=a,
        dh_ptr=dh,
        partials_ptr=partials,
        M=M,
        H=H,
    )


@planned
def gelu_backward(h: Tensor, bias: Tensor | None, da: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """gelu(h + bias) once more, dh, both [M, H], and the bias gradient [H]."""
    h = h.contiguous()
    a, dh = torch.empty_like(h), torch.empty_like(h)  # [M, H] both
    if h.numel() == 0:
        return a, dh, None if bias is None else torch.zeros_like(bias)
    config = launch_config("gelu_backward", h.device, h.dtype, width=h.shape[1])
    config = with_fitting_chunk(config, h.device, cdiv(h.shape[1], config["BLOCK_H"]), h.shape[0])
    partials = None
    if bias is not None:
        bias = bias.contiguous()
        chunks = cdiv(h.shape[0], config["CHUNK"])
        partials = torch.empty((1, chunks, h.shape[1]), device=h.device, dtype=torch.float32)  # [1, chunks, H]
    backward_launch(h, bias, da.contiguous(), a, dh, partials, config=config).run()
    if bias is None or partials is None:
        return a, dh, None
    return a, dh, sum_partials(partials, bias.dtype).view(-1)
