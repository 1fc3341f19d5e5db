"""Ops as formulas, to be run in float64: they share no code with the ops, and their derivatives are PyTorch's own."""

import math

import torch


def rms_norm(x, weight, eps=1e-6):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def ada_layer_norm(x, shift, scale, eps=1e-6):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * (1 + scale[:, None]) + shift[:, None]


def gated_residual(x, y, gate):
    return x + gate[:, None] * y


def layer_scale_residual(x, y, scale):
    return x + y * scale


def swiglu(a, b):
    return a / (1 + torch.exp(-a)) * b


def mlp(x, w1, w2, b1=0.0, b2=0.0):
    h = x @ w1.T + b1
    a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return a @ w2.T + b2


def rotary(x, cos, sin, interleaved=False):
    """Of q or of k: the rotation as a (d, d) matrix per token."""
    N, half = cos.shape
    R = x.new_zeros(N, 2 * half, 2 * half)
    i = torch.arange(half)
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
    R[:, first, first], R[:, first, second] = cos.to(x.dtype), -sin.to(x.dtype)
    R[:, second, first], R[:, second, second] = sin.to(x.dtype), cos.to(x.dtype)
    return torch.einsum("nij,bnhj->bnhi", R, x)


def attention(q, k, v, scale=None, is_causal=False):
    return attention_with_lse(q, k, v, scale, is_causal)[0]


def attention_with_lse(q, k, v, scale=None, is_causal=False):
    """Returns: o [B, N_q, H, d] and the log-sum-exp of the scores [B, H, N_q]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = (a.repeat_interleave(group, dim=2) for a in (k, v))  # [B, N_kv, H, d]
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale  # [B, H, N_q, N_kv]
    if is_causal:
        i, j = (torch.arange(a.shape[1], device=s.device) for a in (q, k))
        s = torch.where(j[None, :] <= i[:, None], s, -torch.inf)
    largest = s.amax(-1, keepdim=True)
    p = torch.exp(s - largest)
    total = p.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhd->bihd", p / total, v), (largest + total.log()).squeeze(-1)
