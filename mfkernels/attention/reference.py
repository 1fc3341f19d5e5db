"""Softmax attention and its tangent in plain PyTorch; layout (B, N, H, d).

    S = scale·QKᵀ, P = softmax(S), O = PV
    Ṡ = scale·(Q̇Kᵀ + QK̇ᵀ),  Ṗ = P∘Ṡ − diag(rowsum(P∘Ṡ)) P,  Ȯ = ṖV + PV̇

The primal is PyTorch's own fused attention, so its backward keeps (q, k, v, o, lse) and nothing else; the tangent
materialises the scores of the tangent rows only, under no_grad.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import softmax_backward


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> Tensor:
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # [B, H, N_q, d]
        k.transpose(1, 2),  # [B, H_kv, N_kv, d]
        v.transpose(1, 2),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)  # [B, N_q, H, d]


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    scale: float,
    is_causal: bool,
    mask: Tensor | None = None,
    mask_dot: Tensor | None = None,
) -> Tensor:
    """All arguments cut to the tangent rows; a tangent of None is zero, not all of them are.

    mask: what the scores are added to, or True where a query sees a key, as PyTorch has it; broadcast to
        (B_t, H, N_q, N_kv). A query that sees no key gives zero.
    """
    B_t, N_q, H, _ = q.shape
    N_kv, dtype = k.shape[1], q.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype  # no statistics in half precision

    def heads(x: Tensor) -> Tensor:
        x = x.to(wide).repeat_interleave(H // x.shape[2], dim=2) if x.shape[2] != H else x.to(wide)
        return x.transpose(1, 2).reshape(B_t * H, x.shape[1], x.shape[3])  # [B_t·H, N, d]

    def of_scores(x: Tensor) -> Tensor:
        return x.expand(B_t, H, N_q, N_kv).reshape(B_t * H, N_q, N_kv)

    Q, K, V = heads(q), heads(k), heads(v)
    s = torch.bmm(Q * scale, K.mT)  # [B_t·H, N_q, N_kv]
    if is_causal:
        visible = torch.ones(N_q, N_kv, dtype=torch.bool, device=q.device).tril()
        s = s.masked_fill_(~visible, float("-inf"))
    if mask is not None:
        mask = of_scores(mask)
        s = s.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else s.add_(mask)
    p = torch.softmax(s, dim=-1)
    if mask is not None:
        p = p.masked_fill_((s == float("-inf")).all(-1, keepdim=True), 0.0)
    o_dot = V.new_zeros(B_t * H, N_q, V.shape[2]) if v_dot is None else torch.bmm(p, heads(v_dot))
    if q_dot is not None or k_dot is not None or mask_dot is not None:
        s_dot = torch.zeros_like(s) if q_dot is None else torch.bmm(heads(q_dot) * scale, K.mT)
        if k_dot is not None:
            s_dot = s_dot.baddbmm_(Q, heads(k_dot).mT, alpha=scale)
        if mask_dot is not None:
            s_dot = s_dot.add_(of_scores(mask_dot))
        # softmax's Jacobian diag(p) − ppᵀ is symmetric: its VJP kernel is its JVP
        p_dot = softmax_backward(s_dot, p, -1, wide)
        o_dot = o_dot.baddbmm_(p_dot, V)  # [B_t·H, N_q, d_v]
    return o_dot.view(B_t, H, N_q, V.shape[2]).transpose(1, 2).to(dtype)  # [B_t, N_q, H, d_v]
