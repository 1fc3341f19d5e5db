"""What `python -m mfkernels.tune` measures of rotary and qk_norm_rotary, on packed qkv buffers."""

from __future__ import annotations

from collections.abc import Iterator

from ..tune_problems import Problem, Sizes, grid
from .op import qk_norm_rotary

OPS = ("rotary", "qk_norm_rotary_backward")
HEADS = 16
ROWS = grid(BLOCK_R=(8, 16, 32, 64), num_warps=(4, 8))
ROWS_AND_SUMS = grid(BLOCK_R=(8, 16, 32), PARTS=(264, 528, 1056), num_warps=(4, 8))


def problems(sizes: Sizes) -> Iterator[Problem]:
    source = sizes.source()
    for head_dim, bounds in sizes.each_head_dim():
        if head_dim % 2:
            continue
        q, k = (source.dual(sizes.batch, sizes.sequence, HEADS, head_dim) for _ in range(2))  # [B, N, H, d]
        weights = [source.tensor(head_dim) for _ in range(2)]  # [d]
        angles = source.tensor(sizes.sequence, head_dim // 2).float()  # [N, d/2]
        table = angles.cos(), angles.sin()
        yield source.problem("rotary", bounds, ROWS, qk_norm_rotary, q, k, *weights, *table)
        yield source.backward_problem(
            "qk_norm_rotary_backward",
            bounds,
            ROWS_AND_SUMS,
            lambda *inputs, table=table: qk_norm_rotary(*inputs, *table),
            q.primal,
            k.primal,
            *weights,
        )
