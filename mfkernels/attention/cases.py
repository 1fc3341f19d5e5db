"""What `python -m mfkernels.check` runs of attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..check.case import NOISE, Case, Inputs, OpCases, random
from .op import attention

# NOISE over one key, where the gradients of q and k are zero in exact arithmetic. Plain PyTorch subtracts two equal
# numbers, a fused backward two sums over the head dim, taken in different orders. Measured on a CPU: 11; PyTorch's own,
# 8. On an H100: 17.3, of the reference.
NOISE_ONE_KEY = 32.0


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))  # [B, N_kv, H, d]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale  # [B, H, N_q, N_kv]
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)  # [N_q, N_kv]
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), v)  # [B, N_q, H, d]


def make(B: int, N: int, H: int, d: int, N_kv: int = 0, H_kv: int = 0, causal: bool = False) -> Case:
    """q, k and v are views of one projection, or of their own where N_kv or H_kv differ from N and H."""

    def inputs(generator: torch.Generator) -> Inputs:
        if not N_kv and not H_kv:
            return dict(zip("qkv", random(generator, B, N, 3, H, d).unbind(2), strict=True))  # [B, N, H, d]
        shapes = {"q": (B, N, H, d), "k": (B, N_kv or N, H_kv or H, d), "v": (B, N_kv or N, H_kv or H, d)}
        return {name: random(generator, *shape) for name, shape in shapes.items()}

    size = f"B={B} N={N}" + (f" N_kv={N_kv}" if N_kv else "") + f" H={H}" + (f" H_kv={H_kv}" if H_kv else "")
    return Case(
        f"{size} d={d}" + (" causal" if causal else ""),
        inputs,
        "qkv",
        lambda **xs: attention(**xs, is_causal=causal),
        lambda q, k, v: softmax_attention(q, k, v, causal),
        part=f"d={d}",
        noise=NOISE_ONE_KEY if (N_kv or N) == 1 else NOISE,
    )


CASES = {
    "attention": OpCases(
        make,
        small=[
            make(2, 63, 2, 64, N_kv=100, H_kv=1),
            make(2, 100, 1, 72),
            make(2, 1, 2, 80),
            make(2, 63, 1, 128, causal=True),
        ],
        large=[
            *(make(2, 63, 4, d, N_kv=100, H_kv=2) for d in (64, 72, 80, 128)),
            *(make(2, 100, 2, d, causal=True) for d in (64, 72, 80, 128)),
            make(2, 100, 2, 64, N_kv=63, H_kv=1, causal=True),
        ],
        timed=(make(2, 64, 2, 72), make(32, 256, 16, 72)),
    )
}
