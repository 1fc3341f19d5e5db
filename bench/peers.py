"""What people write today: a plain PyTorch DiT, and the ways to get its MeanFlow derivative.

`PlainDiT` follows facebookresearch/DiT with MeanFlow's second time; it loads the state dict of `meanflow.models.DiT`.
The tests use it as an independent oracle, the benchmarks as the peer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, N, d]; materialises the scores, as every trainer that uses `torch.func.jvp` must."""
    p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return p @ v


def features(t: Tensor, dim: int = 256) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    args = t[:, None] * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Module()
        hidden = int(dim * mlp_ratio)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def attention(self, x: Tensor, attend: Attention) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.attn.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attn.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, D))

    def forward(self, x: Tensor, c: Tensor, attend: Attention) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(norm(x), shift1, scale1), attend)
        h = F.gelu(self.mlp.fc1(modulate(norm(x), shift2, scale2)), approximate="tanh")
        return x + gate2.unsqueeze(1) * self.mlp.fc2(h)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainDiT(nn.Module):
    """u = net(z, r, t, y); `attend` is `F.scaled_dot_product_attention` or `math_attention`."""

    def __init__(
        self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, mlp_ratio=4.0
    ) -> None:
        super().__init__()
        self.patch_size, self.in_channels, self.side = patch_size, in_channels, input_size // patch_size
        self.num_classes = num_classes
        D = hidden_size
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, D, patch_size, patch_size)
        for name in ("t_embedder", "r_embedder"):
            embedder = nn.Module()
            embedder.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
            setattr(self, name, embedder)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, D)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, D), requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(D, patch_size**2 * in_channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.attend: Attention = F.scaled_dot_product_attention

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder.proj(z).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder.mlp(features(t)) + self.r_embedder.mlp(features(t - r)) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c, self.attend)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        x = self.final_layer.linear(modulate(norm(x), shift, scale))
        B, s, p, C = z.shape[0], self.side, self.patch_size, self.in_channels
        return x.reshape(B, s, s, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, s * p, s * p)


# ---------------------------------------------------------------------- the objective, with each way to its derivative
# Every function takes (net, z, v, r, t, y, rows) and returns the scalar loss ‖u − sg(v − (t − r)·du/dt)‖², summed over
# pixels and averaged over samples. The first `rows` samples have r ≠ t.


def squared_error(u: Tensor, target: Tensor) -> Tensor:
    return (u - target.detach()).square().flatten(1).sum(1).mean()


def flow_matching(net, z, v, r, t, y, rows) -> Tensor:
    """r = t everywhere: the step that MeanFlow is measured against."""
    return squared_error(net(z, t, t, y), v)


def _target(v: Tensor, du: Tensor, r: Tensor, t: Tensor) -> Tensor:
    rows = du.shape[0]
    return torch.cat([v[:rows] - (t - r)[:rows].view(-1, 1, 1, 1) * du, v[rows:]])


def func_jvp(net, z, v, r, t, y, rows) -> Tensor:
    """`torch.func.jvp` over the whole batch, with its graph: what most public trainers do."""
    u, du = torch.func.jvp(lambda z, r, t: net(z, r, t, y), (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    return squared_error(u, _target(v, du, r, t))


def primal_then_jvp(net, z, v, r, t, y, rows) -> Tensor:
    """One primal pass with gradient and a second one through `torch.func.jvp` under no_grad, on `rows` rows."""
    u = net(z, r, t, y)
    attend, net.attend = net.attend, math_attention
    with torch.no_grad():
        _, du = torch.func.jvp(
            lambda z, r, t: net(z, r, t, y[:rows]),
            (z[:rows], r[:rows], t[:rows]),
            (v[:rows], torch.zeros_like(r[:rows]), torch.ones_like(t[:rows])),
        )
    net.attend = attend
    return squared_error(u, _target(v, du, r, t))


# ------------------------------------------------------------------------------- a dual pass written by hand, unfused


def _lin(layer: nn.Linear, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    return layer(x), dx @ layer.weight.detach().T


def _silu(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    xs = x.detach()[: len(dx)]
    s = torch.sigmoid(xs)
    return F.silu(x), dx * (s + xs * s * (1 - s))


def _gelu(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    xs = x.detach()[: len(dx)]
    k = math.sqrt(2 / math.pi)
    th = torch.tanh(k * (xs + 0.044715 * xs**3))
    slope = 0.5 * (1 + th) + 0.5 * xs * (1 - th**2) * k * (1 + 3 * 0.044715 * xs**2)
    return F.gelu(x, approximate="tanh"), dx * slope


def _adaln(x, dx, shift, dshift, scale, dscale):
    xs = x.detach()[: len(dx)]
    mean = xs.mean(-1, keepdim=True)
    rstd = (xs.var(-1, unbiased=False, keepdim=True) + 1e-6).rsqrt()
    xhat = (xs - mean) * rstd
    dxhat = rstd * (dx - dx.mean(-1, keepdim=True) - xhat * (xhat * dx).mean(-1, keepdim=True))
    dy = dxhat * (1 + scale.detach()[: len(dx)].unsqueeze(1)) + xhat * dscale.unsqueeze(1) + dshift.unsqueeze(1)
    return modulate(norm(x), shift, scale), dy


def _attend(q, k, v, dq, dk, dv):
    qs, ks, vs = (a.detach()[: len(dq)] for a in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    p = torch.softmax(qs @ ks.transpose(-1, -2) * scale, dim=-1)
    ds = (dq @ ks.transpose(-1, -2) + qs @ dk.transpose(-1, -2)) * scale
    h = p * ds
    do = h @ vs - h.sum(-1, keepdim=True) * (p @ vs) + p @ dv
    return F.scaled_dot_product_attention(q, k, v), do


def _mlp2(mlp, x, dx, act):
    h, dh = act(*_lin(mlp[0], x, dx))
    return _lin(mlp[1], h, dh)


def _features(t: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    return features(t), torch.func.jvp(features, (t[: len(dt)],), (dt,))[1]


def dual_forward(net: PlainDiT, z, r, t, y, dz, dt) -> tuple[Tensor, Tensor]:
    """`net` with its tangents carried by hand in the most direct formulas; tangent of r is zero."""
    with torch.no_grad():
        dx = F.conv2d(dz, net.x_embedder.proj.weight, stride=net.patch_size).flatten(2).transpose(1, 2)
    x = net.x_embedder.proj(z).flatten(2).transpose(1, 2) + net.pos_embed
    parts = [
        _mlp2((e.mlp[0], e.mlp[2]), *_features(a, dt), _silu) for e, a in ((net.t_embedder, t), (net.r_embedder, t - r))
    ]
    c = parts[0][0] + parts[1][0] + net.y_embedder.embedding_table(y)
    dc = parts[0][1] + parts[1][1]
    _B, N, D = x.shape
    for block in net.blocks:
        m, dm = _lin(block.adaLN_modulation[1], *_silu(c, dc))
        s1, c1, g1, s2, c2, g2 = m.chunk(6, dim=1)
        ds1, dc1, dg1, ds2, dc2, dg2 = dm.chunk(6, dim=1)
        h, dh = _adaln(x, dx, s1, ds1, c1, dc1)
        qkv, dqkv = _lin(block.attn.qkv, h, dh)

        def split(a: Tensor, heads: int = block.heads) -> tuple[Tensor, ...]:
            return a.reshape(a.shape[0], N, 3, heads, D // heads).permute(2, 0, 3, 1, 4).unbind(0)

        o, do = _attend(*split(qkv), *split(dqkv))
        o, do = (a.transpose(1, 2).reshape(-1, N, D) for a in (o, do))
        a, da = _lin(block.attn.proj, o, do)
        rows = len(dx)
        dx = dx + dg1.unsqueeze(1) * a.detach()[:rows] + g1.detach()[:rows].unsqueeze(1) * da
        x = x + g1.unsqueeze(1) * a
        h, dh = _adaln(x, dx, s2, ds2, c2, dc2)
        m, dm = _mlp2((block.mlp.fc1, block.mlp.fc2), h, dh, _gelu)
        dx = dx + dg2.unsqueeze(1) * m.detach()[:rows] + g2.detach()[:rows].unsqueeze(1) * dm
        x = x + g2.unsqueeze(1) * m
    m, dm = _lin(net.final_layer.adaLN_modulation[1], *_silu(c, dc))
    h, dh = _adaln(x, dx, *(part for pair in zip(m.chunk(2, 1), dm.chunk(2, 1), strict=True) for part in pair))
    u, du = _lin(net.final_layer.linear, h, dh)
    s, p, C = net.side, net.patch_size, net.in_channels

    def image(a: Tensor) -> Tensor:
        return a.reshape(-1, s, s, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(-1, C, s * p, s * p)

    return image(u), image(du)


def handwritten_dual(net, z, v, r, t, y, rows) -> Tensor:
    """A dual pass written by hand without fusing anything, on `rows` rows."""
    u, du = dual_forward(net, z, r, t, y, v[:rows], torch.ones_like(t[:rows]))
    return squared_error(u, _target(v, du.detach(), r, t))


# ------------------------------------------------------------------- the objective whole, as public trainers write it


def meanflow_step_loss(net, x, e, t, r, y, omega, kappa) -> Tensor:
    """MeanFlow's loss (arXiv 2505.13447) with guidance and adaptive weight, every sample through `torch.func.jvp`."""
    t_ = t.view(-1, 1, 1, 1)
    z, v = (1 - t_) * x + t_ * e, e - x  # [B, C, H, W]
    if omega != 1 or kappa != 0:
        with torch.no_grad():
            both = torch.cat([y, torch.full_like(y, net.num_classes)])
            u_y, u_null = net(torch.cat([z, z]), torch.cat([t, t]), torch.cat([t, t]), both).chunk(2)
            v = omega * v + kappa * u_y + (1 - omega - kappa) * u_null
    u, du = torch.func.jvp(lambda z, r, t: net(z, r, t, y), (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    target = (v - (t - r).view(-1, 1, 1, 1) * du).detach()
    error = (u - target).square().flatten(1).sum(1)  # [B]
    return (error / (error.detach() + 0.01)).mean()
