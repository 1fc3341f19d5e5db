"""What `python -m mfkernels.check` runs of rotary and of qk_norm_rotary."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..check.case import Case, Inputs, OpCases, joined, random
from ..rms_norm.cases import rms
from .op import qk_norm_rotary, rotary


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Tables of cosines and sines, float32; the first of several tokens has no position."""
    positions = (torch.arange(tokens) - 1).clamp_min(0)  # [N]
    angle = positions[:, None] * 100.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)  # [N, d/2]
    return angle.cos().float(), angle.sin().float()


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)  # the tables are float32, whatever the heads are
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)  # [N, 1, d/2]
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, H, d/2]
    else:
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)  # [B, N, H, d/2]
    pair = torch.stack((a * cos - b * sin, a * sin + b * cos), -1 if interleaved else -2)  # [B, N, H, d/2, 2] or so
    return pair.flatten(-2).to(x.dtype)  # [B, N, H, d]


def make(norm: bool, B: int, N: int, H: int, H_kv: int, d: int, interleaved: bool = False) -> Case:
    """q and k are views of one projection."""

    def inputs(generator: torch.Generator) -> Inputs:
        q, k = random(generator, B, N, H + 2 * H_kv, d).split((H, H_kv, H_kv), 2)[:2]  # [B, N, H, d], [B, N, H_kv, d]
        weights = {name: 1 + 0.3 * random(generator, d) for name in ("q_weight", "k_weight")}  # [d]
        return {"q": q, "k": k, **(weights if norm else {})}

    op = qk_norm_rotary if norm else rotary

    def formula(cos: Tensor, sin: Tensor, **xs: Tensor) -> Tensor:
        if norm:
            xs = {name: rms(xs[name], xs[f"{name}_weight"]) for name in "qk"}
        return torch.cat([turned(xs[name], cos, sin, interleaved) for name in "qk"], 2)  # [B, N, H + H_kv, d]

    size = f"B={B} N={N} H={H}" + (f" H_kv={H_kv}" if H_kv != H else "") + f" d={d}"
    return Case(
        size + (" interleaved" if interleaved else ""),
        inputs,
        ["q", "k"],
        lambda **xs: joined(op(**xs, interleaved=interleaved), 2),
        formula,
        part=f"d={d}",
        constants=dict(zip(("cos", "sin"), angles(N, d), strict=True)),  # [N, d/2]
    )


SIZES = [(2, 17, 2, 1, 64, False), (2, 7, 1, 1, 72, True), (2, 1, 3, 1, 80, False), (2, 5, 1, 1, 128, True)]


def _cases(norm: bool) -> OpCases:
    return OpCases(
        partial(make, norm),
        small=[make(norm, *size) for size in SIZES],
        large=[make(norm, 2, 100, H, H_kv, d, interleaved) for _, _, H, H_kv, d, interleaved in SIZES],
        timed=(make(norm, 2, 64, 2, 2, 72), make(norm, 32, 256, 16, 16, 72)),
    )


CASES = {"rotary": _cases(norm=False), "qk_norm_rotary": _cases(norm=True)}
