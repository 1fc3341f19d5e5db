"""Networks as other people write them; nothing in them knows of tangents. `NETWORKS[name]()` gives a module and its
example inputs, `(z, t)` or `(z, r, t)`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

B = 5


class TimestepEmbedder(nn.Module):
    def __init__(self, width, frequencies=16):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.frequencies // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype) / half).to(t.device)
        args = t[:, None] * freqs[None]
        return self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SiTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attention(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class SiT(nn.Module):
    """Times in the order (z, t, y); patches cut by einsum, as DiT's and SiT's repositories do."""

    def __init__(self, width=32, depth=2, heads=4, patch=2, channels=3, side=8):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = nn.Conv2d(channels, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.randn(1, (side // patch) ** 2, width), requires_grad=False)
        self.t_embedder, self.y_embedder = TimestepEmbedder(width), nn.Embedding(11, width)
        self.blocks = nn.ModuleList(SiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)

    def run(self, block, x, c):
        return block(x, c)

    def unpatchify(self, x):
        p, h = self.patch, int(x.shape[1] ** 0.5)
        assert h * h == x.shape[1]
        x = x.reshape(shape=(x.shape[0], h, h, p, p, self.channels))
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], self.channels, h * p, h * p)

    def forward(self, z, t, y=None):
        x = self.x_embedder(z).flatten(2).transpose(1, 2) + self.pos_embed
        y = torch.zeros(z.shape[0], dtype=torch.long, device=z.device) if y is None else y
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = self.run(block, x, c)
        return self.unpatchify(self.linear(self.norm(x)))


class HandRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class LightningBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, d = heads, width // heads
        self.norm1, self.norm2, self.q_norm, self.k_norm = map(HandRMSNorm, (width, width, d, d))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.w12, self.w3 = nn.Linear(width, 6 * width), nn.Linear(3 * width, width)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))

    @staticmethod
    def rotate(x, freqs):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * freqs.cos() + torch.stack((-b, a), dim=-1).flatten(-2) * freqs.sin()

    def forward(self, x, c, freqs):
        scale1, gate1, scale2, gate2 = self.ada(c)[:, None].chunk(4, dim=-1)
        h = self.norm1(x) * (1 + scale1)
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(self.q_norm(q), freqs), self.rotate(self.k_norm(k), freqs)
        attended = (q * q.size(-1) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        x = x + gate1 * self.proj(attended.transpose(1, 2).flatten(2))
        a, b = self.w12(self.norm2(x) * (1 + scale2)).chunk(2, dim=-1)
        return x + gate2 * self.w3(F.silu(a) * b)


class LightningDiT(nn.Module):
    """RMSNorm, rotary positions, query and key norm, SwiGLU; tokens in, tokens out."""

    def __init__(self, width=32, depth=2, heads=4, channels=6, tokens=7):
        super().__init__()
        self.inp, self.out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.time = TimestepEmbedder(width)
        self.blocks = nn.ModuleList(LightningBlock(width, heads) for _ in range(depth))
        d = width // heads
        angles = torch.arange(tokens)[:, None] * 100.0 ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("freqs", angles.repeat_interleave(2, -1))

    def forward(self, z, r, t):
        x, c = self.inp(z), self.time(t) + self.time(t - r)
        for block in self.blocks:
            x = block(x, c, self.freqs)
        return self.out(x)


class PlainMLP(nn.Module):
    def __init__(self, width=24, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, width), nn.ELU(), nn.Linear(width, 2)
        )

    def forward(self, z, r, t):
        return self.net(torch.cat([z, r[:, None], t.unsqueeze(-1)], dim=1))


class EinsumAttention(nn.Module):
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (
            nn.Parameter(torch.randn(heads, width, width // heads) / 4) for _ in range(3)
        )
        self.out = nn.Parameter(torch.randn(heads, width // heads, width) / 4)
        self.temperature = nn.Parameter(torch.ones(heads))

    def forward(self, z, t):
        q, k, v = (torch.einsum("b n d, h d e -> b h n e", z, w) for w in (self.to_q, self.to_k, self.to_v))
        scores = torch.einsum("bhie,bhje->bhij", q, k) * self.temperature[:, None, None] * t.view(-1, 1, 1, 1)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        return z + torch.einsum("bhij,bhje,hed->bid", weights, v, self.out)


class Encoder(nn.Module):
    """PyTorch's own transformer layer: nn.MultiheadAttention, batch second inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, activation="gelu", norm_first=True)
        self.time = nn.Linear(1, 16)

    def forward(self, z, t):
        return self.layer((z + self.time(t[:, None])[:, None]).transpose(0, 1)).transpose(0, 1)


class UNet(nn.Module):
    """Convolutions, group norms, skips by cat, nearest upsampling."""

    def __init__(self):
        super().__init__()
        self.time = TimestepEmbedder(16)
        self.inp, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.norm, self.mid = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 16, 2, stride=2), nn.Conv2d(48, 3, 1)

    def forward(self, z, t):
        a = F.silu(self.inp(z) + self.time(t)[:, :, None, None])
        b = self.mid(F.silu(self.norm(self.down(a)))) + self.down(a)
        return self.out(torch.cat([a, self.up(b), F.interpolate(b, scale_factor=2, mode="nearest")], dim=1))


def images():
    return torch.randn(B, 3, 8, 8), torch.rand(B)


def timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=6, qk_norm=True, init_values=0.5
    )
    return net, (torch.randn(B, 3, 16, 16),)


def timm_swin():
    from timm.models.swin_transformer import SwinTransformer

    net = SwinTransformer(
        img_size=16, patch_size=2, window_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=6
    )
    return net, (torch.randn(B, 3, 16, 16),)


def timm_eva():
    from timm.models.eva import Eva

    net = Eva(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=6, swiglu_mlp=True)
    return net, (torch.randn(B, 3, 16, 16),)


class Diffusers(nn.Module):
    """A diffusers transformer under the names of this file's inputs; state-dict names get a prefix."""

    def __init__(self, net, **conditions):
        super().__init__()
        self.net, self.names = net, list(conditions)
        for name, x in conditions.items():
            self.register_buffer(name, x, persistent=False)

    def forward(self, z, t):
        return self.net(z, timestep=t, return_dict=False, **{name: getattr(self, name) for name in self.names})[0]


def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return Diffusers(net, class_labels=torch.arange(B)), images()


def diffusers_sd3():
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=10, out_channels=3,
        pos_embed_max_size=8,
    )  # fmt: skip
    text = {"encoder_hidden_states": torch.randn(B, 4, 12).double(), "pooled_projections": torch.randn(B, 10).double()}
    return Diffusers(net, **text), images()


def diffusers_flux():
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=3, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = {
        "encoder_hidden_states": torch.randn(B, 4, 12).double(),
        "pooled_projections": torch.randn(B, 10).double(),
        "img_ids": torch.randn(9, 3),
        "txt_ids": torch.zeros(4, 3),
    }
    return Diffusers(net, **text), (torch.randn(B, 9, 3), torch.rand(B))


def tokens(n, d, *, two_times=False):
    return (torch.randn(B, n, d), *(torch.rand(B) for _ in range(1 + two_times)))


NETWORKS = {
    "SiT-style": lambda: (SiT(), images()),
    "LightningDiT-style": lambda: (LightningDiT(), tokens(7, 6, two_times=True)),
    "plain MLP": lambda: (PlainMLP(), (torch.randn(B, 2), torch.rand(B), torch.rand(B))),
    "einsum attention": lambda: (EinsumAttention(), tokens(5, 16)),
    "nn.TransformerEncoderLayer": lambda: (Encoder(), tokens(5, 16)),
    "U-Net": lambda: (UNet(), images()),
    "timm ViT": timm_vit,
    "timm Swin": timm_swin,
    "timm EVA": timm_eva,
    "diffusers DiT": diffusers_dit,
    "diffusers SD3": diffusers_sd3,
    "diffusers Flux": diffusers_flux,
}


def network(name, dtype=torch.float64):
    """A module with no weight at zero, and its inputs, in training mode."""
    torch.manual_seed(3)
    net, inputs = NETWORKS[name]()
    net.to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return net, tuple(x.to(dtype) for x in inputs)
