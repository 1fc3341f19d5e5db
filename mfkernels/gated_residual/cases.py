"""What `python -m mfkernels.check` runs of gated_residual and of its form with a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ada_layer_norm.cases import modulated
from ..check.case import joined, token_cases
from .op import gated_residual, gated_residual_ada_layer_norm


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y  # [B, N, D]


def _sum_and_norm(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    x_new = residual(x, y, gate)  # [B, N, D]
    return torch.cat((x_new, modulated(x_new, shift, scale)), 1)  # [B, 2N, D]


def _fused(**xs: Any) -> Any:
    return joined(gated_residual_ada_layer_norm(**xs), 1)


CASES = {
    "gated_residual": token_cases(gated_residual, residual, "x y gate"),
    "gated_residual_ada_layer_norm": token_cases(_fused, _sum_and_norm, "x y gate shift scale"),
}
