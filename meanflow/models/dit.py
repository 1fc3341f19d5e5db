"""DiT with adaLN-Zero (arXiv 2212.09748) that predicts MeanFlow's average velocity u(z, r, t, y) (arXiv 2505.13447).

Run on tensors it is a plain network; run on `mfkernels.Dual`s it also returns its directional derivative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfkernels import (
    Attention,
    Dual,
    Linear,
    Mlp,
    PatchEmbed,
    ResidualStream,
    SiLU,
    TensorOrDual,
    TimestepEmbedder,
    dual_aware,
    linear_map,
    split_map,
)
from mfkernels._torch import is_untouched
from mfkernels.checks import check_number

from ..checks import check_labels
from ..registry import register


def sincos_2d(dim: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding of DiT and MAE.

    Args:
        dim: width D, a multiple of 4.
        side: patches per side.

    Returns:
        (side², D) float32: the first half encodes the column, the second the row, each [sin, cos].
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # [D/4]
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega  # [side, D/4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, D/2]
    column = axis[None, :, :].expand(side, side, -1)  # [side, side, D/2]
    row = axis[:, None, :].expand(side, side, -1)  # [side, side, D/2]
    return torch.cat([column, row], dim=-1).reshape(side * side, dim).float()


class LabelEmbedder(nn.Module):
    """Class labels to vectors; index `num_classes` means "no label". Parameter name as DiT's (`embedding_table`)."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # [B, D]


@dual_aware
class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning, on Tensor | Dual."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: TensorOrDual | ResidualStream, c: TensorOrDual) -> TensorOrDual | ResidualStream:
        """(B, N, D) of x (B, N, D) and c (B, D); of a stream a stream, whose last update is still to be added."""
        stream = x if isinstance(x, ResidualStream) else ResidualStream(x)
        modulation = self.adaLN_modulation(c)  # [B, 6·D]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = split_map(
            lambda a: a.chunk(6, dim=1), modulation
        )  # [B, D] each
        h, stream = stream.normed(shift_attn, scale_attn)  # [B, N, D]
        y, bias = _branch(self.attn, h, stream)  # [B, N, D], [D]
        h, stream = stream.update_and_norm(y, gate_attn, bias, shift_mlp, scale_mlp)  # [B, N, D]
        if not isinstance(x, ResidualStream):  # the sum is wanted now, where a bias would be a pass of its own
            return stream.updated(self.mlp(h), gate_mlp).value()  # [B, N, D]
        y, bias = _branch(self.mlp, h, stream)  # [B, N, D], [D]
        # the bias is used by the next block, when FSDP2 may have freed this one's parameters
        return stream.updated(y, gate_mlp, None if bias is None else bias.clone())


def _branch(module: nn.Module, h: TensorOrDual, stream: ResidualStream) -> tuple[TensorOrDual, Tensor | None]:
    """What `module` makes of h, and the bias of its last layer where the stream adds it."""
    if is_untouched(module, Attention, Mlp):  # whatever has been put in its place, or sees its output, gets all of it
        last = module.proj if isinstance(module, Attention) else module.fc2
        if isinstance(last, nn.Linear) and is_untouched(last, nn.Linear, Linear) and stream.takes_bias(last.bias):
            return module(h, add_bias=False), last.bias
    return module(h), None


@dual_aware
class FinalLayer(nn.Module):
    """Adaptive layer norm and projection to patches, on Tensor | Dual."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: TensorOrDual | ResidualStream, c: TensorOrDual) -> TensorOrDual:
        stream = x if isinstance(x, ResidualStream) else ResidualStream(x)
        shift, scale = split_map(lambda a: a.chunk(2, dim=1), self.adaLN_modulation(c))  # [B, D] each
        h, _ = stream.normed(shift, scale)  # [B, N, D]
        return self.linear(h)  # [B, N, p·p·C]


@register("models", "DiT")
@dual_aware
class DiT(nn.Module):
    """Diffusion transformer conditioned on t and t − r, on Tensor | Dual.

    State-dict names are DiT's own, plus `r_embedder`, which embeds t − r.

    Args:
        input_size: side of the (square) image or latent, a multiple of `patch_size`.
        patch_size: side p of a patch.
        in_channels: channels C of the image or latent.
        hidden_size: width D, a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads H.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: number of labels; label `num_classes` means "no label".

    Raises:
        ValueError: a size does not fit; the message names it.

    Attributes:
        embeds_gap: whether there is an embedding of t − r beside that of t.
    """

    embeds_gap: ClassVar[bool] = True

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.config = arguments(locals())
        check_sizes(self.config)
        if hidden_size % 4 != 0:
            raise ValueError(f"hidden_size: expected a multiple of 4, got {hidden_size}")
        if hidden_size % num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of hidden_size = {hidden_size}, got {num_heads}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if self.embeds_gap:
            self.r_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sincos_2d(hidden_size, input_size // patch_size)[None]  # [1, N, D]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.register_load_state_dict_pre_hook(_fill_positions)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's initialisation: Xavier linears, small embedders, zeros where a block or the output starts silent."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        assert self.x_embedder.proj.bias is not None
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.r_embedder) if self.embeds_gap else (self.t_embedder,):
            for layer in (embedder.mlp[0], embedder.mlp[2]):
                nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        silent = [self.final_layer.adaLN_modulation, self.final_layer.linear]
        silent += [block.get_submodule("adaLN_modulation") for block in self.blocks]
        for module in silent:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def conditioning(self, r: TensorOrDual, t: TensorOrDual, y: Tensor) -> Sequence[TensorOrDual]:
        """What each block is told, and then the last layer, (B, D) each."""
        c = self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y)  # [B, D]
        return [c] * (len(self.blocks) + 1)

    def forward(self, z: TensorOrDual, r: TensorOrDual, t: TensorOrDual, y: Tensor) -> TensorOrDual:
        """The average velocity over [r, t] at z.

        Args:
            z: (B, C, H, W) tensor or Dual.
            r, t: (B,) times in [0, 1], r <= t; tensors or Duals.
            y: (B,) integer labels in [0, num_classes].

        Returns:
            (B, C, H, W), a Dual if any argument is one.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        check_inputs(z, r, t, y, (self.in_channels, self.input_size, self.input_size))
        x = self.x_embedder(z) + self.pos_embed  # [B, N, D]
        *told, last_told = self.conditioning(r, t, y)  # [B, D] each
        stream = ResidualStream(x)
        for block, c in zip(self.blocks, told, strict=True):
            # hooks, wrappers and checkpoints see tensors
            streams = is_untouched(block, DiTBlock)
            stream = block(stream, c) if streams else ResidualStream(block(stream.value(), c))  # [B, N, D]
        last = stream if is_untouched(self.final_layer, FinalLayer) else stream.value()  # [B, N, D]
        x = self.final_layer(last, last_told)  # [B, N, p·p·C]
        return unpatchify(x, self.patch_size, self.in_channels)  # [B, C, H, W]


def unpatchify(x: TensorOrDual, patch_size: int, channels: int) -> TensorOrDual:
    """Tokens (B, s·s, p·p·C) of a square image, row by row, as the image (B, C, s·p, s·p)."""
    p, side = patch_size, math.isqrt(x.shape[1])

    def run(a: Tensor) -> Tensor:
        a = a.unflatten(1, (side, side)).unflatten(-1, (p, p, channels))  # [B, s, s, p, p, C]
        return a.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * p, side * p)

    return linear_map(run, x)


def check_inputs(z: TensorOrDual, r: TensorOrDual, t: TensorOrDual, y: Tensor, image: tuple[int, int, int]) -> None:
    """Raise unless z is (B, *image), r and t are (B,) and y is (B,) of an integer type."""
    B = z.shape[0]
    if tuple(z.shape[1:]) != image:
        raise ValueError(f"z: expected shape (B, {', '.join(map(str, image))}), got {tuple(z.shape)}")
    for name, a in (("r", r), ("t", t)):
        if not isinstance(a, (Tensor, Dual)):
            raise TypeError(f"{name}: expected a tensor of {B} entries, got {type(a).__name__}")
        if tuple(a.shape) != (B,):
            raise ValueError(f"{name}: expected shape ({B},), the batch of z, got {tuple(a.shape)}")
    check_labels(y, B, "z")


def arguments(variables: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, from its `locals()` before it has any others."""
    return {name: value for name, value in variables.items() if name not in ("self", "__class__")}


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise unless a transformer of these sizes can be built."""
    for name, size in sizes.items():
        least = 0 if name == "depth" else 1
        if name not in ("input_size", "mlp_ratio", "aux_head_depth", "v_head") and size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
    input_size, patch_size = sizes["input_size"], sizes["patch_size"]
    if input_size < patch_size or input_size % patch_size != 0:
        raise ValueError(f"input_size: expected a multiple of patch_size = {patch_size}, got {input_size}")
    check_number("mlp_ratio", sizes["mlp_ratio"], 0, above=True)


def _fill_positions(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The positions are fixed, so a state dict may leave them out (the JAX programs' weights do)."""
    assert isinstance(module, DiT)
    state_dict.setdefault(f"{prefix}pos_embed", module.pos_embed.detach())


SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "M": {"hidden_size": 1024, "depth": 16, "num_heads": 16},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

NAMED = {
    f"DiT-{size}/{patch_size}": partial(DiT, patch_size=patch_size, **widths)
    for size, widths in SIZES.items()
    for patch_size in (2, 4, 8)
}
for name, make in NAMED.items():
    register("models", name)(make)

DiT_S_2, DiT_S_4, DiT_S_8 = (NAMED[f"DiT-S/{p}"] for p in (2, 4, 8))
DiT_B_2, DiT_B_4, DiT_B_8 = (NAMED[f"DiT-B/{p}"] for p in (2, 4, 8))
DiT_M_2, DiT_M_4, DiT_M_8 = (NAMED[f"DiT-M/{p}"] for p in (2, 4, 8))
DiT_L_2, DiT_L_4, DiT_L_8 = (NAMED[f"DiT-L/{p}"] for p in (2, 4, 8))
DiT_XL_2, DiT_XL_4, DiT_XL_8 = (NAMED[f"DiT-XL/{p}"] for p in (2, 4, 8))
