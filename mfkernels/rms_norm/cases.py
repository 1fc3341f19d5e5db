"""What `python -m mfkernels.check` runs of rms_norm."""

from __future__ import annotations

from torch import Tensor

from ..check.case import EPS, channel_cases
from .op import rms_norm


def rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight  # [B, …, D]


CASES = {"rms_norm": channel_cases(rms_norm, rms, "x", "weight")}
