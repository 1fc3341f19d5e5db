"""u_tgt = v − (t − r)·du/dt where there is a tangent, v elsewhere; e = ‖u − u_tgt‖², loss = sg(e + ε)^(−p)·e."""

from __future__ import annotations

import torch
from torch import Tensor


def meanflow_loss(
    u: Tensor,
    du_dt: Tensor,
    v: Tensor,
    t: Tensor,
    r: Tensor,
    norm_p: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    rows = du_dt.shape[0]
    wide = torch.promote_types(u.dtype, torch.float32)
    wide_t = torch.promote_types(t.dtype, torch.float32)  # the difference of two half-precision times needs more bits
    with torch.no_grad():
        interval = (t[:rows].to(wide_t) - r[:rows].to(wide_t)).to(wide).view(-1, *[1] * (u.ndim - 1))  # [B_t, 1, …]
        u_tgt = v.to(wide, copy=True)  # [B, …]
        u_tgt[:rows].addcmul_(interval, du_dt.to(wide), value=-1)
    squared_error = (u.to(wide) - u_tgt).square().flatten(1).sum(dim=1)  # [B]
    weight = (squared_error.detach() + norm_eps).pow(-norm_p)  # [B]
    return weight * squared_error, squared_error.detach()
