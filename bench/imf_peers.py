"""Improved MeanFlow as one writes it in plain PyTorch: an iMF-DiT, and its objective with `torch.func.jvp` on all rows.

`PlainIMFDiT` loads the state dict of `meanflow.models.IMFDiT`. The tests use it as an independent oracle, the
benchmarks as the peer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peers import features, math_attention
from torch import Tensor, nn

from mfkernels.measuring import flops_of


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


def rotate(x: Tensor) -> Tensor:
    """[B, H, N, d]: neighbouring channels as complex numbers, turned by e^(i n ω)."""
    N, d = x.shape[-2:]
    angle = torch.outer(
        torch.arange(N, dtype=torch.float64), 1 / 10000 ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    ).to(x.device, x.dtype)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self.attn, name, nn.Linear(dim, dim, bias=False))
        self.attn.q_norm, self.attn.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.mlp = nn.Module()
        self.mlp.w1, self.mlp.w2, self.mlp.w3 = (
            nn.Linear(a, b, bias=False) for a, b in ((dim, hidden), (hidden, dim), (dim, hidden))
        )
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, attend) -> Tensor:
        h, a = self.norm1(x), self.attn
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)
        )  # [B, H, N, d]
        o = attend(rotate(a.q_norm(q)), rotate(a.k_norm(k)), v)
        x = x + a.out_proj(o.transpose(1, 2).flatten(2)) * self.attn_scale
        h = self.norm2(x)
        return x + self.mlp.w2(F.silu(self.mlp.w1(h)) * self.mlp.w3(h)) * self.mlp_scale


class PlainIMFDiT(nn.Module):
    """u, v = net(z, h, omega, t_min, t_max, y); `attend` is `F.scaled_dot_product_attention` or `math_attention`."""

    def __init__(
        self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, aux_head_depth,
        num_class_tokens, num_time_tokens, num_cfg_tokens, num_interval_tokens,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_size, self.in_channels, self.side = patch_size, in_channels, input_size // patch_size
        self.num_classes = num_classes
        D = hidden_size
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, D, patch_size, patch_size)
        for name in ("h_embedder", "omega_embedder", "cfg_t_start_embedder", "cfg_t_end_embedder"):
            embedder = nn.Module()
            embedder.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
            setattr(self, name, embedder)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, D)
        self.class_tokens = nn.Parameter(torch.zeros(num_class_tokens, D))
        self.omega_tokens = nn.Parameter(torch.zeros(num_cfg_tokens, D))
        self.t_min_tokens = nn.Parameter(torch.zeros(num_interval_tokens, D))
        self.t_max_tokens = nn.Parameter(torch.zeros(num_interval_tokens, D))
        self.time_tokens = nn.Parameter(torch.zeros(num_time_tokens, D))
        hidden = D * 8 // 3
        self.shared_blocks = nn.ModuleList(Block(D, num_heads, hidden) for _ in range(depth - aux_head_depth))
        for head in "uv":
            setattr(self, f"{head}_heads", nn.ModuleList(Block(D, num_heads, hidden) for _ in range(aux_head_depth)))
            final = nn.Module()
            final.norm, final.linear = RMSNorm(D), nn.Linear(D, patch_size**2 * in_channels)
            setattr(self, f"{head}_final_layer", final)
        self.attend = F.scaled_dot_product_attention

    def forward(self, z, h, omega, t_min, t_max, y) -> tuple[Tensor, Tensor]:
        groups = (
            (self.class_tokens, self.y_embedder.embedding_table(y)),
            (self.omega_tokens, self.omega_embedder.mlp(features(1 - 1 / omega))),
            (self.t_min_tokens, self.cfg_t_start_embedder.mlp(features(t_min))),
            (self.t_max_tokens, self.cfg_t_end_embedder.mlp(features(t_max))),
            (self.time_tokens, self.h_embedder.mlp(features(h))),
        )
        patches = self.x_embedder.proj(z).flatten(2).transpose(1, 2)
        x = torch.cat([*(tokens[None] + embedding[:, None] for tokens, embedding in groups), patches], dim=1)
        for block in self.shared_blocks:
            x = block(x, self.attend)
        return self.head(x, self.u_heads, self.u_final_layer), self.head(x, self.v_heads, self.v_final_layer)

    def head(self, x: Tensor, blocks: nn.ModuleList, final: nn.Module) -> Tensor:
        for block in blocks:
            x = block(x, self.attend)
        B, s, p, C = x.shape[0], self.side, self.patch_size, self.in_channels
        x = final.linear(final.norm(x))[:, -s * s :]
        return x.reshape(B, s, s, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, s * p, s * p)


def improved_meanflow(net, x, noise, t, r, y, drop, omega, t_min, t_max, *, norm_p=1.0, norm_eps=0.01):
    """The paper's algorithm with every forward on every row; returns (per-sample loss, u, du/dt, guided v, v head)."""
    c_t, c_r, c_drop, c_omega = (a.view(-1, 1, 1, 1) for a in (t, r, drop, omega))
    z, v = (1 - c_t) * x + c_t * noise, noise - x
    null, zero, one = torch.full_like(y, net.num_classes), torch.zeros_like(t), torch.ones_like(t)
    same = r == t
    t_min, t_max = torch.where(same, 0.0, t_min), torch.where(same, 1.0, t_max)
    inside = ((t >= t_min) & (t <= t_max)).view(-1, 1, 1, 1)
    c_omega = torch.where(inside, c_omega, 1.0)
    with torch.no_grad():
        _, v_c = net(z, zero, c_omega.flatten(), zero, one, y)
        _, v_u = net(z, zero, one, zero, one, null)
        v_g = torch.where(c_drop, v, v + (1 - 1 / c_omega) * (v_c - v_u))
    y_in = torch.where(drop, null, y)
    attend, net.attend = net.attend, math_attention  # PyTorch's fused attention has no forward-mode rule
    u, du, v_head = torch.func.jvp(
        lambda z, r, t: net(z, t - r, omega, t_min, t_max, y_in), (z, r, t), (v_c, zero, one), has_aux=True
    )
    net.attend = attend
    big_v = u + (c_t - c_r) * du.detach()
    losses = [(a - v_g).square().sum((1, 2, 3)) for a in (big_v, v_head)]
    return sum(e / (e.detach() + norm_eps) ** norm_p for e in losses), u, du, v_g, v_head


def step_flops(net, objective, *, rows: int = 2) -> tuple[int, int]:
    """FLOPs of a training step (loss and gradients) and of one training forward with both heads, of `net`."""
    C, side = net.in_channels, net.input_size
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, rows, C, side, side, generator=g)
    t = 0.2 + 0.8 * torch.rand(rows, generator=g)
    r = torch.where(torch.arange(rows) < round(rows * objective.ratio), t / 2, t)
    y, one, zero = torch.zeros(rows, dtype=torch.long), torch.ones(rows), torch.zeros(rows)
    guidance = {"omega": 2 * one, "t_min": zero, "t_max": one}
    forward = flops_of(lambda: net(x, r, t, y, **guidance))
    step = flops_of(lambda: objective.loss_at(net, x=x, noise=e, t=t, r=r, y=y, **guidance).loss.backward())
    return step, forward
