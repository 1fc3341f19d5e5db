"""What `python -m mfkernels.tune` measures: for each op its candidates and a call that runs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mfkernels
from mfkernels.attention.backward_kernels import attention_backward
from mfkernels.attention.kernels import attention_forward
from mfkernels.launch import Config
from mfkernels.mlp.kernels import gelu_backward, gelu_forward

NOT_TUNED = {"sum_partials", "timestep_embedding"}  # they take microseconds
NOT_TUNED |= {"attention_forward_apart"}  # no kernel

Bounds = Mapping[str, int | str]


@dataclass(frozen=True)
class Problem:
    """One row to be found: the op, its conditions, the candidates, and a call that runs the op and gives results."""

    op: str
    conditions: Bounds
    candidates: Sequence[Config]
    run: Callable[[], Sequence[Tensor]]


def grid(num_stages: Sequence[int] = (1,), **choices: Sequence[int]) -> list[Config]:
    """Every combination."""
    choices = {**choices, "num_stages": num_stages}
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


ATTENTION_FORWARD = [
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
ATTENTION_BACKWARD = [
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
TOKEN_ROWS = grid(BLOCK_N=(1, 2, 4), CHUNK=(8, 16, 64), num_warps=(4, 8))
ROWS = grid(BLOCK_R=(1, 2, 4, 8), num_warps=(4, 8))
ROWS_AND_SUMS = grid(BLOCK_R=(1, 2, 4), PARTS=(264, 528, 1056), num_warps=(4, 8))
HEAD_ROWS = grid(BLOCK_R=(8, 16, 32, 64), num_warps=(4, 8))
HEAD_ROWS_AND_SUMS = grid(BLOCK_R=(8, 16, 32), PARTS=(264, 528, 1056), num_warps=(4, 8))
SWIGLU = grid(BLOCK_R=(1, 2, 4, 8), BLOCK_D=(256, 512, 1024), num_warps=(4, 8))
GELU = grid(BLOCK_M=(1, 2, 4, 8), BLOCK_H=(256, 512, 1024), num_warps=(4, 8))
GELU_BACKWARD = grid(BLOCK_M=(2, 4, 8), BLOCK_H=(256, 512), CHUNK=(64, 128, 256), num_warps=(4, 8))
LOSS = grid(CHUNK=(4096, 8192, 16384), BLOCK=(1024, 2048), num_warps=(4, 8))


class Source:
    """Random tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.generator = torch.Generator(device).manual_seed(0)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, **self.options)

    def dual(self, *shape: int) -> mfkernels.Dual:
        return mfkernels.Dual(self.tensor(*shape), self.tensor(*shape))

    def problem(
        self, op: str, bounds: Bounds, candidates: Sequence[Config], fn: Callable[..., Any], *args: Any
    ) -> Problem:
        """The forward of `fn`, a function of this package that launches `op`, under no_grad."""

        def run() -> list[Tensor]:
            with torch.no_grad(), mfkernels.use_backend("triton"):
                return _tensors(fn(*args))

        return Problem(op, bounds, candidates, run)

    def backward_problem(
        self, op: str, bounds: Bounds, candidates: Sequence[Config], fn: Callable[..., Any], *args: Any
    ) -> Problem:
        """The backward of `fn`, whose tensors all get a gradient."""
        inputs = [a.requires_grad_() for a in args if isinstance(a, Tensor)]
        with mfkernels.use_backend("triton"):
            out = _tensors(fn(*args))
        d_out = [self.tensor(*a.shape).to(a.dtype) for a in out]

        def run() -> Sequence[Tensor]:
            return torch.autograd.grad(out, inputs, d_out, retain_graph=True)

        return Problem(op, bounds, candidates, run)


def _tensors(out: Any) -> list[Tensor]:
    """All tensors of nested tuples."""
    if isinstance(out, Tensor):
        return [out]
    return [] if out is None else [a for part in out for a in _tensors(part)]


def attention_problems(
    head_dim: int, tokens: int, batch: int, dtype: torch.dtype, device: torch.device, bounds: Bounds
) -> Iterator[Problem]:
    """Forward with and without tangents, and the two kernels of the backward, on packed qkv buffers."""
    heads, source = 16, Source(dtype, device)
    q, k, v = source.tensor(batch, tokens, 3, heads, head_dim).unbind(2)  # [B, N, H, D]
    dots = source.tensor(batch, tokens, 3, heads, head_dim).unbind(2)  # [B, N, H, D]
    do = source.tensor(batch, tokens, heads, head_dim)  # [B, N, H, D]
    scale, bounds = head_dim**-0.5, {**bounds, "precision": "ieee"}

    def forward() -> Sequence[Tensor]:
        o, o_dot, _ = attention_forward(q, k, v, *dots, scale=scale)
        return _tensors((o, o_dot))

    def primal() -> Sequence[Tensor]:
        return attention_forward(q, k, v, scale=scale)[:1]

    yield Problem("attention_forward", bounds, ATTENTION_FORWARD, forward)
    yield Problem("attention_forward_primal", bounds, ATTENTION_FORWARD, primal)
    o, _, lse = attention_forward(q, k, v, scale=scale)
    for op in ("attention_backward_dq", "attention_backward_dkdv"):
        yield Problem(op, bounds, ATTENTION_BACKWARD, lambda: attention_backward(do, q, k, v, o, lse, scale=scale))


def head_problems(
    head_dim: int, tokens: int, batch: int, dtype: torch.dtype, device: torch.device, bounds: Bounds
) -> Iterator[Problem]:
    """Rotary and its backward with QK-norm, on packed qkv buffers."""
    heads, source = 16, Source(dtype, device)
    q, k = (source.dual(batch, tokens, heads, head_dim) for _ in range(2))  # [B, N, H, D]
    weights = [source.tensor(head_dim) for _ in range(2)]  # [D]
    angles = source.tensor(tokens, head_dim // 2).float()  # [N, D/2]
    table = angles.cos(), angles.sin()
    yield source.problem("rotary", bounds, HEAD_ROWS, mfkernels.qk_norm_rotary, q, k, *weights, *table)
    yield source.backward_problem(
        "qk_norm_rotary_backward",
        bounds,
        HEAD_ROWS_AND_SUMS,
        lambda q, k, w_q, w_k: mfkernels.qk_norm_rotary(q, k, w_q, w_k, *table),
        q.primal,
        k.primal,
        *weights,
    )


def width_problems(
    width: int, tokens: int, batch: int, dtype: torch.dtype, device: torch.device, bounds: Bounds
) -> Iterator[Problem]:
    """The ops over rows of `width` channels."""
    source = Source(dtype, device)
    x, y = (source.dual(batch, tokens, width) for _ in range(2))  # [B, N, D]
    shift, scale, gate = (source.dual(batch, width) for _ in range(3))  # [B, D]
    weight = source.tensor(width)  # [D]
    rms, residual, layer_scale = mfkernels.rms_norm, mfkernels.gated_residual, mfkernels.layer_scale_residual
    fused_norm, fused = mfkernels.gated_residual_ada_layer_norm, (x, y, gate, shift, scale)
    yield source.problem("ada_layer_norm_forward", bounds, TOKEN_ROWS, fused_norm, *fused)
    primals = [a.primal.clone() for a in fused]
    yield source.backward_problem("ada_layer_norm_backward", bounds, TOKEN_ROWS, fused_norm, *primals)
    yield source.problem("gated_residual_forward", bounds, TOKEN_ROWS, residual, x, y, gate)
    yield source.backward_problem("gated_residual_backward", bounds, TOKEN_ROWS, residual, *primals[:3])
    yield source.problem("rms_norm_forward", bounds, ROWS, rms, x, weight)
    yield source.backward_problem("rms_norm_backward", bounds, ROWS_AND_SUMS, rms, primals[0], weight.clone())
    yield source.problem("layer_scale_residual_forward", bounds, ROWS, layer_scale, x, y, weight)
    yield source.backward_problem(
        "layer_scale_residual_backward", bounds, ROWS_AND_SUMS, layer_scale, *primals[:2], weight.clone()
    )


def hidden_problems(
    width: int, tokens: int, batch: int, dtype: torch.dtype, device: torch.device, bounds: Bounds
) -> Iterator[Problem]:
    """The activations of feed-forward networks of hidden width `width`."""
    source = Source(dtype, device)
    h, h_dot = source.dual(batch * tokens, width)  # [M, H]
    da, bias = source.tensor(batch * tokens, width), source.tensor(width)  # [M, H], [H]
    yield Problem("gelu_forward", bounds, GELU, lambda: _tensors(gelu_forward(h, bias, h_dot)))
    yield Problem("gelu_backward", bounds, GELU_BACKWARD, lambda: _tensors(gelu_backward(h, bias, da)))
    x, y = (source.dual(batch, tokens, width) for _ in range(2))  # [B, N, H]
    yield source.problem("swiglu", bounds, SWIGLU, mfkernels.swiglu, x, y)


def loss_problems(tokens: int, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Problem]:
    """The loss on latents of 4 channels, four numbers a token and channel."""
    source = Source(dtype, device)
    side = 2 * round(tokens**0.5)
    u, v, correction = (source.tensor(batch, 4, side, side) for _ in range(3))  # [B, C, H, W]
    interval = source.tensor(batch).sigmoid()  # [B]
    u.requires_grad_()

    def step() -> Sequence[Tensor]:
        with mfkernels.use_backend("triton"):
            return torch.autograd.grad(
                mfkernels.adaptive_squared_error(u, v, correction, interval).per_sample.mean(), u
            )

    yield Problem("adaptive_squared_error", {}, LOSS, step)
