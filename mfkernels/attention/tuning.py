"""What `python -m mfkernels.tune` measures of attention: the forward with and without tangents, and the backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..tune_problems import Bounds, Problem, Sizes, tensors, tile
from .backward_kernels import attention_backward
from .kernels import attention_forward

OPS = ("attention_forward", "attention_forward_primal", "attention_backward_dq", "attention_backward_dkdv")
HEADS = 16
FORWARD = [
    tile(128, 64, 8, 2),
    tile(128, 64, 8, 3),
    tile(128, 128, 8, 2),
    tile(128, 128, 8, 3),
    tile(128, 64, 4, 2),
    tile(128, 32, 8, 2),
    tile(128, 32, 8, 3),
    tile(64, 64, 4, 2),
    tile(64, 64, 4, 3),
    tile(64, 32, 4, 2),
    tile(64, 32, 8, 2),
    tile(32, 32, 4, 2),
]
BACKWARD = [
    tile(64, 64, 4, 2),
    tile(64, 64, 8, 2),
    tile(128, 64, 8, 2),
    tile(128, 64, 8, 3),
    tile(64, 128, 8, 2),
    tile(64, 128, 8, 3),
    tile(32, 128, 8, 2),
    tile(32, 64, 4, 2),
    tile(32, 64, 8, 2),
    tile(128, 32, 8, 2),
    tile(64, 32, 4, 2),
    tile(32, 32, 4, 2),
]


def problems(sizes: Sizes) -> Iterator[Problem]:
    for head_dim, of_head in sizes.each_head_dim():
        for tokens, of_tokens in sizes.each_length():
            yield from _problems(sizes, head_dim, tokens, {**of_head, **of_tokens, "precision": "ieee"})


def _problems(sizes: Sizes, head_dim: int, tokens: int, bounds: Bounds) -> Iterator[Problem]:
    """On packed qkv buffers."""
    source, B = sizes.source(), max(1, sizes.total // tokens)
    q, k, v = source.tensor(B, tokens, 3, HEADS, head_dim).unbind(2)  # [B, N, H, d]
    dots = source.tensor(B, tokens, 3, HEADS, head_dim).unbind(2)  # [B, N, H, d]
    do, scale = source.tensor(B, tokens, HEADS, head_dim), head_dim**-0.5  # [B, N, H, d]

    def forward() -> Sequence[Tensor]:
        o, o_dot, _ = attention_forward(q, k, v, *dots, scale=scale)
        return tensors((o, o_dot))

    def primal() -> Sequence[Tensor]:
        return attention_forward(q, k, v, scale=scale)[:1]

    yield Problem("attention_forward", bounds, FORWARD, forward)
    yield Problem("attention_forward_primal", bounds, FORWARD, primal)
    o, _, lse = attention_forward(q, k, v, scale=scale)
    for op in ("attention_backward_dq", "attention_backward_dkdv"):
        yield Problem(op, bounds, BACKWARD, lambda: attention_backward(do, q, k, v, o, lse, scale=scale))
