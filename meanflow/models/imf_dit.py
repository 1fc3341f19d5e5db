"""iMF-DiT, the backbone of improved MeanFlow (arXiv 2512.02012): every condition is a group of tokens in the sequence.

Run on tensors it is a plain network; run on `mfkernels.Dual`s its average velocity also returns its derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfkernels import (
    Dual,
    Linear,
    PatchEmbed,
    RMSNorm,
    SwiGLU,
    TensorOrDual,
    TimestepEmbedder,
    attention,
    dual_aware,
    layer_scale_residual,
    linear_map,
    qk_norm_rotary,
)
from mfkernels.checks import check_number
from mfkernels.dual import padded_tangent, primal_of, tangent_rows

from ..registry import register
from .dit import LabelEmbedder, arguments, check_inputs, check_sizes, unpatchify


@dual_aware
class IMFAttention(nn.Module):
    """Self-attention with QK-norm and rotary positions, without biases, on Tensor | Dual; names are the authors'.

    Args:
        dim: width D.
        num_heads: number of heads H, a divisor of D; D / H is even.

    Raises:
        ValueError: `num_heads` does not divide `dim` into heads of even width.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0 or (dim // num_heads) % 2 != 0:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size = {dim} that leaves heads of even width, got {num_heads}"
            )
        self.num_heads = num_heads
        self.q_proj = Linear(dim, dim, bias=False)
        self.k_proj = Linear(dim, dim, bias=False)
        self.v_proj = Linear(dim, dim, bias=False)
        self.out_proj = Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)

    def forward(self, x: TensorOrDual, cos: Tensor, sin: Tensor) -> TensorOrDual:
        q, k, v = (
            linear_map(lambda a: a.unflatten(-1, (self.num_heads, -1)), proj(x))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, N, H, d] each
        q, k = qk_norm_rotary(
            q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, eps=self.q_norm.eps, interleaved=True
        )  # [B, N, H, d] both
        o = attention(q, k, v)  # [B, N, H, d]
        return self.out_proj(linear_map(lambda a: a.flatten(2), o))  # [B, N, D]


@dual_aware
class IMFBlock(nn.Module):
    """Pre-norm transformer block whose branches start at zero through a factor per channel, on Tensor | Dual."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = IMFAttention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * mlp_ratio))
        self.attn_scale = nn.Parameter(torch.zeros(hidden_size))
        self.mlp_scale = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: TensorOrDual, cos: Tensor, sin: Tensor) -> TensorOrDual:
        x = layer_scale_residual(x, self.attn(self.norm1(x), cos, sin), self.attn_scale)  # [B, N, D]
        return layer_scale_residual(x, self.mlp(self.norm2(x)), self.mlp_scale)  # [B, N, D]


@dual_aware
class IMFFinalLayer(nn.Module):
    """RMS norm and projection to patches, on Tensor | Dual."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: TensorOrDual) -> TensorOrDual:
        return self.linear(self.norm(x))  # [B, N, p·p·C]


@register("models", "iMF-DiT")
@dual_aware
class IMFDiT(nn.Module):
    """Improved MeanFlow's transformer (arXiv 2512.02012, §4): (u, v) = net(z, r, t, y, omega=, t_min=, t_max=).

    The sequence is [class | ω | t_min | t_max | t − r | patches]: each condition is its embedding, added to a group of
    learned tokens; t itself is not embedded. `depth − aux_head_depth` shared blocks are followed by two heads of
    `aux_head_depth` blocks each: the average velocity u over [r, t], and an auxiliary instantaneous velocity v that
    training needs and sampling does not. Tangents of Duals pass through the shared blocks and the u head only.

    State-dict names are the authors' own.

    Args:
        input_size: side of the (square) image or latent, a multiple of `patch_size`.
        patch_size: side p of a patch.
        in_channels: channels C of the image or latent.
        hidden_size: width D, a multiple of `num_heads`; each head has an even width.
        depth: blocks on the way to u: the shared ones and those of its head.
        num_heads: attention heads H.
        mlp_ratio: hidden width of the SwiGLU over D, rounded down.
        num_classes: number of labels; label `num_classes` means "no label".
        aux_head_depth: blocks of each head, at most `depth`.
        num_class_tokens, num_time_tokens, num_cfg_tokens: tokens for the label, for t − r and for ω.
        num_interval_tokens: tokens for t_min, and as many for t_max.
        v_head: whether the v head is built; without it the network samples, but does not train.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    outputs = ("u", "v")
    not_options = ("v_head",)  # training needs it

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
        aux_head_depth: int = 8,
        num_class_tokens: int = 8,
        num_time_tokens: int = 4,
        num_cfg_tokens: int = 4,
        num_interval_tokens: int = 2,
        mlp_ratio: float = 8 / 3,
        v_head: bool = True,
    ) -> None:
        super().__init__()
        self.config = arguments(locals())
        check_sizes(self.config)
        if not 0 <= aux_head_depth <= depth:
            raise ValueError(f"aux_head_depth: expected a number in [0, {depth}] (depth), got {aux_head_depth}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.has_v_head = num_classes, v_head
        D = hidden_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, D)
        self.h_embedder = TimestepEmbedder(D)
        self.omega_embedder = TimestepEmbedder(D)
        self.cfg_t_start_embedder = TimestepEmbedder(D)
        self.cfg_t_end_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(num_classes, D)
        self.class_tokens = nn.Parameter(torch.empty(num_class_tokens, D))
        self.omega_tokens = nn.Parameter(torch.empty(num_cfg_tokens, D))
        self.t_min_tokens = nn.Parameter(torch.empty(num_interval_tokens, D))
        self.t_max_tokens = nn.Parameter(torch.empty(num_interval_tokens, D))
        self.time_tokens = nn.Parameter(torch.empty(num_time_tokens, D))

        def blocks(n: int) -> nn.ModuleList:
            return nn.ModuleList(IMFBlock(D, num_heads, mlp_ratio) for _ in range(n))

        self.shared_blocks = blocks(depth - aux_head_depth)
        self.u_heads = blocks(aux_head_depth)
        self.u_final_layer = IMFFinalLayer(D, patch_size, in_channels)
        if v_head:
            self.v_heads = blocks(aux_head_depth)
            self.v_final_layer = IMFFinalLayer(D, patch_size, in_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The authors' initialisation: normal weights scaled by the width they read; branches and outputs at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = 1.0 if "embedder" in name else 0.32
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, IMFFinalLayer):
                nn.init.ones_(module.norm.weight)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        assert self.x_embedder.proj.bias is not None
        nn.init.zeros_(self.x_embedder.proj.bias)
        std = 1.0 / math.sqrt(self.config["hidden_size"])
        for name, parameter in self.named_parameters():
            if name.endswith(("_tokens", "embedding_table.weight")):
                nn.init.normal_(parameter, std=std)
            elif "final_layer.linear" in name:
                nn.init.zeros_(parameter)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        names = ("num_class_tokens", "num_cfg_tokens", "num_time_tokens")
        return sum(self.config[name] for name in names) + 2 * self.config["num_interval_tokens"]

    def forward(
        self,
        z: TensorOrDual,
        r: TensorOrDual,
        t: TensorOrDual,
        y: Tensor,
        *,
        omega: Tensor | float = 1.0,
        t_min: Tensor | float = 0.0,
        t_max: Tensor | float = 1.0,
        heads: Literal["uv", "u", "v"] = "uv",
    ) -> tuple[TensorOrDual | None, Tensor | None]:
        """The average velocity u over [r, t] at z, and the auxiliary velocity v.

        Args:
            z: (B, C, H, W) tensor or Dual.
            r, t: (B,) times in [0, 1], r <= t; tensors or Duals.
            y: (B,) integer labels in [0, num_classes].
            omega: (B,) or a number: guidance scale, at least 1; 1 is no guidance.
            t_min, t_max: (B,) or numbers: ends of the interval of times that are guided, 0 <= t_min <= t_max <= 1.
            heads: which heads are run; the other output is None.

        Returns:
            (u, v), both (B, C, H, W). u is a Dual if z, r or t is one; v is a plain tensor, it carries no tangent. It
            is None in a network built without a v head.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_inputs(z, r, t, y, (self.in_channels, self.input_size, self.input_size))
        if heads not in ("uv", "u", "v"):
            raise ValueError(f"heads: expected 'uv', 'u' or 'v', got {heads!r}")
        if heads == "v" and not self.has_v_head:
            raise ValueError("heads: the network was built without a v head (v_head=False), got 'v'")
        _check_guidance(omega, t_min, t_max)
        omega, t_min, t_max = (
            _per_sample(name, a, t) for name, a in (("omega", omega), ("t_min", t_min), ("t_max", t_max))
        )  # [B] each
        if heads == "v":
            z, r, t = primal_of(z), primal_of(r), primal_of(t)
        h = t - r  # [B]
        x = _concatenate(
            [
                _tokens(self.y_embedder(y), self.class_tokens),
                _tokens(self.omega_embedder(1 - 1 / omega), self.omega_tokens),
                _tokens(self.cfg_t_start_embedder(t_min), self.t_min_tokens),
                _tokens(self.cfg_t_end_embedder(t_max), self.t_max_tokens),
                _tokens(self.h_embedder(h), self.time_tokens),
                self.x_embedder(z),
            ]
        )  # [B, N, D]
        cos, sin = self._rotations(x.shape[1], x.dtype, x.device)  # [N, d/2] both
        for block in self.shared_blocks:
            x = block(x, cos, sin)  # [B, N, D]
        u = v = None
        if "v" in heads and self.has_v_head:
            v = self._head(primal_of(x), cos, sin, self.v_heads, self.v_final_layer)  # [B, C, H, W]
        if "u" in heads:
            u = self._head(x, cos, sin, self.u_heads, self.u_final_layer)  # [B, C, H, W]
        return u, v

    def _head(self, x: TensorOrDual, cos: Tensor, sin: Tensor, blocks: nn.ModuleList, final: nn.Module) -> Any:
        for block in blocks:
            x = block(x, cos, sin)  # [B, N, D]
        patches = linear_map(lambda a: a[:, self.num_prefix_tokens :], x)  # [B, N − prefix, D]
        return unpatchify(final(patches), self.patch_size, self.in_channels)  # [B, C, H, W]

    def _rotations(self, N: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of n·10000^(−2i/d) for token n (prefix included) and pair i (arXiv 2104.09864), (N, d/2)."""
        d = self.config["hidden_size"] // self.config["num_heads"]
        frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)  # [d/2]
        angle = torch.arange(N, dtype=torch.float64, device=device)[:, None] * frequency  # [N, d/2]
        wide = torch.promote_types(dtype, torch.float32)  # half precision has no room for positions
        return angle.cos().to(wide), angle.sin().to(wide)


def _check_guidance(omega: Tensor | float, t_min: Tensor | float, t_max: Tensor | float) -> None:
    """Raise unless those that are numbers are in their ranges; tensors are not read."""
    for name, a in (("omega", omega), ("t_min", t_min), ("t_max", t_max)):
        if not isinstance(a, (Tensor, Real)):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(a).__name__}")
    if isinstance(omega, Real):
        check_number("omega", omega, 1)
    low, high = t_min if isinstance(t_min, Real) else 0.0, t_max if isinstance(t_max, Real) else 1.0
    if not 0.0 <= low <= high <= 1.0:  # NaN fails too
        raise ValueError(f"t_min, t_max: expected 0 <= t_min <= t_max <= 1, got {low} and {high}")


def _per_sample(name: str, a: Tensor | float, t: TensorOrDual) -> Tensor:
    """A condition as (B,), with the dtype of `t` where it is a number."""
    time = primal_of(t)
    if not isinstance(a, Tensor):
        return torch.full_like(time, a, requires_grad=False)  # [B]
    if a.ndim == 0:
        return a.expand(time.shape)  # [B]
    if a.shape != time.shape:
        raise ValueError(
            f"{name}: expected a number or shape {tuple(time.shape)}, the batch of z, got {tuple(a.shape)}"
        )
    return a


def _tokens(embedding: TensorOrDual, tokens: Tensor) -> TensorOrDual:
    """Learned tokens (n, D), each with the sample's embedding (B, D) added: (B, n, D)."""
    if isinstance(embedding, Dual):
        return linear_map(lambda a: a.unsqueeze(1), embedding) + tokens  # [B, n, D]
    return embedding.unsqueeze(1) + tokens  # [B, n, D]


def _concatenate(parts: Sequence[TensorOrDual]) -> TensorOrDual:
    """Token groups (B, n_i, D) one after the other; groups without a tangent have tangent zero."""
    x = torch.cat([primal_of(part) for part in parts], dim=1)  # [B, N, D]
    if not any(isinstance(part, Dual) for part in parts):
        return x
    rows = tangent_rows(*parts)
    if rows is None:
        return Dual(x)
    with torch.no_grad():
        dots = [padded_tangent(part, rows) for part in parts]
        filled = [
            x.new_zeros(rows, part.shape[1], x.shape[2]) if dot is None else dot
            for part, dot in zip(parts, dots, strict=True)
        ]
        return Dual(x, torch.cat(filled, dim=1).to(x.dtype))  # [B_t, N, D]


SIZES: dict[str, dict[str, Any]] = {
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "M": {"hidden_size": 768, "depth": 24, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 32, "num_heads": 16},
    "XL": {"hidden_size": 1024, "depth": 48, "num_heads": 16},
}

NAMED = {f"iMF-DiT-{size}/2": partial(IMFDiT, patch_size=2, **widths) for size, widths in SIZES.items()}
for name, make in NAMED.items():
    register("models", name)(make)

IMFDiT_B_2, IMFDiT_M_2, IMFDiT_L_2, IMFDiT_XL_2 = (NAMED[f"iMF-DiT-{size}/2"] for size in SIZES)
