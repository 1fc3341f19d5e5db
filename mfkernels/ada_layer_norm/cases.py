"""What `python -m mfkernels.check` runs of ada_layer_norm."""

from __future__ import annotations

from torch import Tensor

from ..check.case import EPS, token_cases
from .op import ada_layer_norm


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)  # [B, N, D]
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()  # [B, N, D]
    return normed * (1 + scale[:, None]) + shift[:, None]  # [B, N, D]


CASES = {"ada_layer_norm": token_cases(ada_layer_norm, modulated, "x shift scale")}
