"""What the ops' `tuning.py` share: problems for `python -m mfkernels.tune`.

A `tuning.py` has `OPS`, the rows of launch tables that it tunes, and `problems(sizes)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mfkernels
from mfkernels.launch import Config

Bounds = Mapping[str, int | str]


@dataclass(frozen=True)
class Problem:
    """One row to be found: the op, its conditions, the candidates, and a call that launches the op."""

    op: str
    conditions: Bounds
    candidates: Sequence[Config]
    run: Callable[[], Sequence[Tensor]]


def grid(num_stages: Sequence[int] = (1,), **choices: Sequence[int]) -> list[Config]:
    """Every combination of the choices."""
    choices = {**choices, "num_stages": num_stages}
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


# candidates of kernels that several ops have alike
TOKEN_ROWS = grid(BLOCK_N=(1, 2, 4), CHUNK=(8, 16, 64), num_warps=(4, 8))
ROWS = grid(BLOCK_R=(1, 2, 4, 8), num_warps=(4, 8))
ROWS_AND_SUMS = grid(BLOCK_R=(1, 2, 4), PARTS=(264, 528, 1056), num_warps=(4, 8))


@dataclass(frozen=True)
class Sizes:
    """The measured sizes: batches of `total` tokens; rows and heads in sequences of 256 tokens."""

    head_dims: Sequence[int]
    widths: Sequence[int]
    hidden_widths: Sequence[int]
    tokens: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    total: int = 65536

    @property
    def sequence(self) -> int:
        return min(256, self.total)

    @property
    def batch(self) -> int:
        """The number of sequences of 256 tokens."""
        return max(1, self.total // 256)

    def source(self) -> Source:
        return Source(self.dtype, self.device)

    def each_head_dim(self) -> Iterator[tuple[int, Bounds]]:
        return _each("head_dim", self.head_dims)

    def each_width(self) -> Iterator[tuple[int, Bounds]]:
        return _each("width", self.widths)

    def each_hidden_width(self) -> Iterator[tuple[int, Bounds]]:
        return _each("width", self.hidden_widths)

    def each_length(self) -> Iterator[tuple[int, Bounds]]:
        return _each("tokens", self.tokens)


def _each(name: str, sizes: Sequence[int]) -> Iterator[tuple[int, Bounds]]:
    for least, size in ranges(sizes):
        yield size, {f"min_{name}": least, f"max_{name}": size}


def ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The range of sizes that each measured size stands for: down to the next smaller one."""
    ordered = sorted(set(sizes))
    return [(low + 1, high) for low, high in zip([ordered[0] - 1, *ordered], ordered, strict=False)]


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
                return tensors(fn(*args))

        return Problem(op, bounds, candidates, run)

    def backward_problem(
        self, op: str, bounds: Bounds, candidates: Sequence[Config], fn: Callable[..., Any], *args: Any
    ) -> Problem:
        """The backward of `fn`, whose tensors all get a gradient."""
        inputs = [a.requires_grad_() for a in args if isinstance(a, Tensor)]
        with mfkernels.use_backend("triton"):
            out = tensors(fn(*args))
        d_out = [self.tensor(*a.shape).to(a.dtype) for a in out]

        def run() -> Sequence[Tensor]:
            return torch.autograd.grad(out, inputs, d_out, retain_graph=True)

        return Problem(op, bounds, candidates, run)


def tensors(out: Any) -> list[Tensor]:
    """All tensors of nested tuples."""
    if isinstance(out, Tensor):
        return [out]
    return [] if out is None else [a for part in out for a in tensors(part)]
