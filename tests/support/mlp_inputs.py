"""Arguments of `mlp`, for the files of its tests."""

import torch


def make(*shape, hidden, out=None):
    D = shape[-1]
    return {
        "x": torch.randn(shape, dtype=torch.float64),
        "w1": torch.randn(hidden, D, dtype=torch.float64) / D**0.5,
        "b1": torch.randn(hidden, dtype=torch.float64),
        "w2": torch.randn(out or D, hidden, dtype=torch.float64) / hidden**0.5,
        "b2": torch.randn(out or D, dtype=torch.float64),
    }
