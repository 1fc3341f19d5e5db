"""target = v − interval·correction on the first rows, v on the rest; e = ‖u − target‖², sg(e + eps)^(−p)·e."""

from __future__ import annotations

import torch
from torch import Tensor


def adaptive_squared_error(
    u: Tensor, v: Tensor, correction: Tensor | None, interval: Tensor | None, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, torch.float32)
    with torch.no_grad():
        target = v.to(wide, copy=True)  # [B, …]
        if correction is not None and interval is not None:
            rows = correction.shape[0]
            interval = interval[:rows].to(wide).view(-1, *[1] * (u.ndim - 1))  # [B_t, 1, …]
            target[:rows].addcmul_(interval, correction.to(wide), value=-1)
    squared_error = (u.to(wide) - target).square().flatten(1).sum(dim=1)  # [B]
    weight = (squared_error.detach() + eps).pow(-p)  # [B]
    return weight * squared_error, squared_error.detach()
