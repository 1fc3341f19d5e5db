"""What `python -m mfkernels.check` runs of mlp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..check.case import Case, Inputs, OpCases, random
from .op import mlp


def perceptron(x: Tensor, w1: Tensor, b1: Tensor | float, w2: Tensor, b2: Tensor | float) -> Tensor:
    h = x @ w1.mT + b1  # [B, N, D_hidden]
    a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # [B, N, D_hidden]
    return a @ w2.mT + b2  # [B, N, D]


def make(B: int, N: int, D: int, hidden: int) -> Case:
    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "x": random(generator, B, N, D),  # [B, N, D]
            "w1": random(generator, hidden, D) / D**0.5,  # [D_hidden, D]
            "b1": random(generator, hidden),  # [D_hidden]
            "w2": random(generator, D, hidden) / hidden**0.5,  # [D, D_hidden]
            "b2": random(generator, D),  # [D]
        }

    return Case(f"B={B} N={N} D={D} hidden={hidden}", inputs, ["x"], mlp, perceptron)


CASES = {
    "mlp": OpCases(
        make,
        small=[make(3, 21, 100, 276), make(2, 1, 96, 2730), make(3, 21, 96, 264)],
        large=[make(2, 17, 1152, 4608)],  # DiT-XL's
        timed=(make(2, 64, 96, 384), make(32, 256, 1152, 4608)),
    )
}
