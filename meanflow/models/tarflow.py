"""TarFlow (arXiv 2412.06329): a normalizing flow of causal transformers, one pass from images to noise.

Each block is an affine autoregressive flow over patches; its inverse goes patch by patch, with a cache of keys and
values.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, pad, pixel_shuffle, pixel_unshuffle, scaled_dot_product_attention

from mfkernels.checks import check_number

from ..checks import check_floating, check_label_range, check_labels
from ..registry import register
from .dit import arguments, check_sizes

Guided = Literal["ab", "a", "b"]


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Images (B, C, H, W) as patches (B, N, C·p·p), row by row; a patch is in the order of C, row, column."""
    return pixel_unshuffle(x, patch_size).flatten(2).mT  # [B, N, C·p·p]


def unpatchify(x: Tensor, patch_size: int, side: int) -> Tensor:
    """The inverse of `patchify` for images of side `side`: (B, C, side, side)."""
    s = side // patch_size
    return pixel_shuffle(x.mT.unflatten(2, (s, s)), patch_size)  # [B, C, H, W]


class KeyValueCache:
    """Keys and values of the patches that a layer has seen, with room for `length` of them."""

    def __init__(self, length: int) -> None:
        self.length, self.used = length, 0
        self.kv = torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of further patches, (B, H, n, d) each; returns all of them."""
        new = torch.stack([k, v])  # [2, B, H, n, d]
        if self.used == 0:
            self.kv = new.new_empty(*new.shape[:3], self.length, new.shape[4])  # [2, B, H, N, d]
        start, self.used = self.used, self.used + k.shape[2]
        self.kv[:, :, :, start : self.used] = new
        k, v = self.kv[:, :, :, : self.used].unbind(0)  # [B, H, used, d] each
        return k, v


class CausalAttention(nn.Module):
    """Self-attention in which a patch sees itself and the patches before it."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, sharpness: Tensor | None = None) -> Tensor:
        """(B, N, D) of x (B, N, D).

        Args:
            cache: of the patches before; x is then the next patch alone, N = 1.
            sharpness: (B, 1, 1, 1) factor of the attention logits; default: 1.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
        if sharpness is not None:
            q = q * sharpness  # [B, H, N, d]
        if cache is not None:
            k, v = cache.append(k, v)  # [B, H, used, d] each
        o = scaled_dot_product_attention(q, k, v, is_causal=cache is None)  # [B, H, N, d]
        return self.proj(o.transpose(1, 2).flatten(2))  # [B, N, D]


class TarFlowMlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))  # [B, N, D]


class TarFlowLayer(nn.Module):
    """Pre-norm causal transformer layer."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(dim, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = TarFlowMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, sharpness: Tensor | None = None) -> Tensor:
        """(B, N, D) of x (B, N, D); the other arguments as in `CausalAttention`."""
        x = x + self.attn(self.norm1(x), cache, sharpness)  # [B, N, D]
        return x + self.mlp(self.norm2(x))  # [B, N, D]


class TarFlowBlock(nn.Module):
    """Affine autoregressive flow over patches (arXiv 2412.06329, equations 4 and 5): z_i = (x_i − μ_i)·exp(−α_i), where
    the shift μ_i and the log-scale α_i are functions of the patches before i, and zero for the first.

    Args:
        num_patches: patches N.
        patch_dim: numbers P of a patch.
        dim, num_layers, head_dim, mlp_ratio: of the transformer.
        num_classes: number of labels; label `num_classes` has the mean of their embeddings. 0: labels are not used.
        backwards: whether the patches are taken from the last one on.
        scaled: whether there is a log-scale; without it the block keeps volumes.
    """

    def __init__(
        self,
        num_patches: int,
        patch_dim: int,
        dim: int,
        num_layers: int,
        head_dim: int,
        mlp_ratio: float,
        num_classes: int,
        *,
        backwards: bool,
        scaled: bool,
    ) -> None:
        super().__init__()
        self.backwards, self.scaled = backwards, scaled
        self.proj_in = nn.Linear(patch_dim, dim)
        self.pos_embed = nn.Parameter(torch.empty(num_patches, dim))
        self.class_embed = nn.Parameter(torch.empty(num_classes, dim)) if num_classes else None
        self.layers = nn.ModuleList(TarFlowLayer(dim, head_dim, mlp_ratio) for _ in range(num_layers))
        self.proj_out = nn.Linear(dim, 2 * patch_dim if scaled else patch_dim)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The flow towards noise.

        Args:
            x: (B, N, P) patches.
            y: (B,) integer labels in [0, num_classes].

        Returns:
            (B, N, P) patches in the order of x; (B,) logarithm of the Jacobian's determinant, divided by N·P.
        """
        x = self.in_order(x)  # [B, N, P]
        h = self.embed(x[:, :-1], self.in_order(self.pos_embed[None])[:, :-1], y)  # [B, N − 1, D]
        for layer in self.layers:
            h = layer(h)  # [B, N − 1, D]
        log_scale, shift = (pad(a, (0, 0, 1, 0)) for a in self.affine(h, x))  # [B, N, P] each
        z = (x - shift) * (-log_scale).exp()  # [B, N, P]
        return self.in_order(z), -log_scale.mean(dim=(1, 2))

    def reverse(
        self,
        z: Tensor,
        y: Tensor,
        *,
        null: Tensor | None = None,
        weights: Tensor | None = None,
        guide: Guided = "ab",
        sharpness: Tensor | None = None,
    ) -> Tensor:
        """The flow towards images: the x (B, N, P) whose `forward` is z (B, N, P), one patch after another.

        Args:
            y: (B,) labels.
            null: (B,) labels of a second pass in the same batch; default: none.
            weights: (N − 1,) by which the prediction of patch 1, 2, … is moved away from that of the second pass.
            guide: what is moved of log-scale (a) and shift (b).
            sharpness: as in `CausalAttention`, of both passes together.
        """
        B, N = z.shape[:2]
        x = self.in_order(z).clone()  # [B, N, P]
        pos = self.in_order(self.pos_embed[None])  # [1, N, D]
        y = y if null is None else torch.cat([y, null])  # [B or 2·B]
        caches = [KeyValueCache(N - 1) for _ in self.layers]
        for i in range(N - 1):
            last = x[:, i : i + 1]  # [B, 1, P]
            if null is not None:
                last = last.repeat(2, 1, 1)  # [2·B, 1, P]
            h = self.embed(last, pos[:, i : i + 1], y)  # [B or 2·B, 1, D]
            for layer, cache in zip(self.layers, caches, strict=True):
                h = layer(h, cache, sharpness)  # [B or 2·B, 1, D]
            log_scale, shift = self.affine(h[:, 0], last)  # [B or 2·B, P] each
            if null is not None and weights is not None:
                log_scale, shift = (
                    a[:B] + weights[i] * (a[:B] - a[B:]) if name in guide else a[:B]
                    for name, a in (("a", log_scale), ("b", shift))
                )  # [B, P] each
            x[:, i + 1] = x[:, i + 1] * log_scale.exp() + shift
        return self.in_order(x)

    def in_order(self, x: Tensor) -> Tensor:
        """Patches (B, N, …) in the order of the block, or back in theirs."""
        return x.flip(1) if self.backwards else x

    def embed(self, x: Tensor, pos: Tensor, y: Tensor) -> Tensor:
        """(B, n, D) of patches x (B, n, P), their positions (1, n, D) and labels y (B,)."""
        h = self.proj_in(x.to(self.proj_in.weight.dtype)) + pos  # [B, n, D]
        if self.class_embed is None:
            return h
        table = torch.cat([self.class_embed, self.class_embed.mean(dim=0, keepdim=True)])  # [K + 1, D]
        return h + embedding(y, table)[:, None]  # [B, n, D]

    def affine(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scale and shift (…, P) that h (…, D) predicts, in the dtype of x."""
        out = self.proj_out(h).to(x.dtype)  # […, P or 2·P]
        if self.scaled:
            log_scale, shift = out.chunk(2, dim=-1)  # [..., P] each
            return log_scale, shift
        return torch.zeros_like(out), out


@register("models", "TarFlow")
class TarFlow(nn.Module):
    """Normalizing flow of causal transformers over patches (arXiv 2412.06329): z, log_det = net(x, r, t, y).

    Every other block takes the patches in the opposite order. The density of an image is log p(x) =
    log N(z; 0, 1) + D·log_det, D = C·H·W; the flow has no times, and r and t are not read.

    Args:
        input_size: side of the (square) image or latent, a multiple of `patch_size` and larger.
        patch_size: side p of a patch.
        in_channels: channels C of the image or latent.
        hidden_size: width of the transformers, a multiple of `head_dim`.
        depth: number of blocks.
        layers_per_block: transformer layers of each.
        head_dim: width of an attention head.
        mlp_ratio: hidden width of the MLP over `hidden_size`.
        num_classes: number of labels; label `num_classes` means "no label": the mean of their embeddings.
        nvp: blocks scale as well as shift. Without, they keep volumes, and one scale per dimension follows the last
            (NICE, arXiv 1410.8516, §3.3): the prior's variance.
        class_conditional: labels are used.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    outputs = ("z", "log_det")

    def __init__(
        self,
        input_size: int = 64,
        patch_size: int = 2,
        in_channels: int = 3,
        hidden_size: int = 768,
        depth: int = 8,
        layers_per_block: int = 8,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        nvp: bool = True,
        class_conditional: bool = True,
    ) -> None:
        super().__init__()
        self.config = arguments(locals())
        check_sizes({name: size for name, size in self.config.items() if not isinstance(size, bool)})
        if hidden_size % head_dim != 0:
            raise ValueError(f"head_dim: expected a divisor of hidden_size = {hidden_size}, got {head_dim}")
        if input_size == patch_size:
            raise ValueError(f"patch_size: expected less than input_size = {input_size}, got {patch_size}: one patch")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes
        N, P = (input_size // patch_size) ** 2, in_channels * patch_size**2
        labels = num_classes if class_conditional else 0
        self.blocks = nn.ModuleList(
            TarFlowBlock(
                N,
                P,
                hidden_size,
                layers_per_block,
                head_dim,
                mlp_ratio,
                labels,
                backwards=i % 2 == 1,
                scaled=nvp,
            )
            for i in range(depth)
        )
        self.log_var = None if nvp else nn.Parameter(torch.empty(N, P))  # of the prior
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier linears, small embeddings, and zeros where a block's output starts as its input."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(("pos_embed", "class_embed")):
                nn.init.normal_(parameter, std=0.02)
            elif "proj_out" in name or name == "log_var":
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, r: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The flow from images to noise.

        Args:
            x: (B, C, H, W) images.
            r, t: not read: networks of this library are called as net(z, r, t, y).
            y: (B,) integer labels in [0, num_classes].

        Returns:
            z (B, C, H, W), of standard normal distribution where x is of the flow's; log_det (B,), the logarithm of the
            determinant of ∂z/∂x, divided by C·H·W. Both in float32 at least.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        self._check("x", x, y)
        wide = torch.promote_types(x.dtype, torch.float32)  # sums of many layers need more bits than half precision has
        z = patchify(x.to(wide), self.patch_size)  # [B, N, P]
        log_det = z.new_zeros(z.shape[0])  # [B]
        for block in self.blocks:
            z, of_block = block(z, y)  # [B, N, P], [B]
            log_det = log_det + of_block  # [B]
        if self.log_var is not None:
            half = self.log_var.to(wide) / 2  # [N, P]
            z, log_det = z * (-half).exp(), log_det - half.mean()  # [B, N, P], [B]
        return unpatchify(z, self.patch_size, self.input_size), log_det

    @torch.no_grad()
    def reverse(
        self,
        z: Tensor,
        y: Tensor,
        *,
        guidance_scale: float = 1.0,
        annealed: bool = False,
        guide: Guided = "ab",
        attention_temperature: float = 1.0,
    ) -> Tensor:
        """The flow from noise to images: `depth` times one pass over the patches, one after another.

        Guidance moves log-scale and shift of a patch, u, away from those without label, u_null (arXiv 2412.06329,
        equations 9 and 10): u + (guidance_scale − 1)·(u − u_null). It has another Jacobian, so `forward` does not undo
        it. Both passes are one batch.

        Args:
            z: (B, C, H, W) standard normal noise.
            y: (B,) integer labels in [0, num_classes].
            guidance_scale: 1 is none; the paper's w is this less 1.
            annealed: the i-th of the N − 1 predicted patches of a block, counted from 1, has i/(N − 1) of w.
            guide: what is guided: log-scale and shift ("ab"), or one of them.
            attention_temperature: the attention logits of the pass without label are divided by it. It guides networks
                that know no labels.

        Returns:
            (B, C, H, W) images, in float32 at least.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        self._check("z", z, y)
        check_number("guidance_scale", guidance_scale, 0)
        check_number("attention_temperature", attention_temperature, 0, above=True)
        if guide not in get_args(Guided):
            raise ValueError(f"guide: expected 'ab', 'a' or 'b', got {guide!r}")
        x = patchify(z.to(torch.promote_types(z.dtype, torch.float32)), self.patch_size)  # [B, N, P]
        if self.log_var is not None:
            x = x * (self.log_var.to(x.dtype) / 2).exp()  # [B, N, P]
        B, N = x.shape[:2]
        null = weights = sharpness = None
        if guidance_scale != 1.0:
            null = torch.full_like(y, self.num_classes)  # [B]
            weights = x.new_full((N - 1,), guidance_scale - 1)  # [N − 1]
            if annealed:
                weights = weights * torch.arange(1, N, dtype=x.dtype, device=x.device) / (N - 1)  # [N − 1]
            if attention_temperature != 1.0:
                dtype = self.blocks[0].get_parameter("pos_embed").dtype if len(self.blocks) else x.dtype
                sharpness = x.new_ones(2 * B, 1, 1, 1, dtype=dtype)
                sharpness[B:] /= attention_temperature
        for block in reversed(self.blocks):
            assert isinstance(block, TarFlowBlock)
            x = block.reverse(x, y, null=null, weights=weights, guide=guide, sharpness=sharpness)  # [B, N, P]
        return unpatchify(x, self.patch_size, self.input_size)

    @torch.no_grad()
    def update_prior(self, z: Tensor, rate: float = 0.1) -> None:
        """The authors' rule for the prior's variance without `nvp`: a moving average of the squared noise.

        Training by `TarFlowLikelihood` has no use for it: the variance is a parameter of the density there.

        Args:
            z: (B, C, H, W), what `forward` returned.
            rate: weight of z, in [0, 1].

        Raises:
            ValueError: the network has no such variance, or `rate` is out of its range.
        """
        if self.log_var is None:
            raise ValueError("nvp: expected a network with nvp=False; with nvp=True the prior's variance is 1")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate: expected a number in [0, 1], got {rate}")
        var = self.log_var.exp()  # [N, P]
        # z is of unit variance; the last block's output is √var times it
        square = var * patchify(z.detach().to(var.dtype), self.patch_size).square().mean(dim=0)  # [N, P]
        self.log_var.copy_(var.lerp(square, rate).log())

    def _check(self, name: str, x: Tensor, y: Tensor) -> None:
        check_floating(name, x)
        image = (self.in_channels, self.input_size, self.input_size)
        if tuple(x.shape[1:]) != image:
            raise ValueError(f"{name}: expected shape (B, {', '.join(map(str, image))}), got {tuple(x.shape)}")
        check_labels(y, x.shape[0], name)
        check_label_range(y, self)
