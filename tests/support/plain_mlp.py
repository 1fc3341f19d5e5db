"""The MLP that the tests of `mlp` compare with, and its arguments."""

import math

import torch


def oracle(x, w1, w2, b1=0.0, b2=0.0):
    h = x @ w1.T + b1
    a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return a @ w2.T + b2


def make(*shape, hidden, out=None):
    D = shape[-1]
    return {
        "x": torch.randn(shape, dtype=torch.float64),
        "w1": torch.randn(hidden, D, dtype=torch.float64) / D**0.5,
        "b1": torch.randn(hidden, dtype=torch.float64),
        "w2": torch.randn(out or D, hidden, dtype=torch.float64) / hidden**0.5,
        "b2": torch.randn(out or D, dtype=torch.float64),
    }
