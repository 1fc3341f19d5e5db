"""Spectral normalisation: linears whose weight has a bounded largest singular value."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from mfkernels.checks import check_number

_ORIGINAL = "parametrizations.weight.original"


class SpectralBound(nn.Module):
    """W · min(1, bound/σ(W)) with the largest singular value σ(W): what is within the bound stays as it is.

    σ² is the largest eigenvalue of WᵀW or WWᵀ, whichever is smaller, in float32 at least and under any autocast. It
    has no state: each evaluation in a step, each recompute of a checkpointed block and each average of the weights
    sees the bound of its own weights, in training and in evaluation alike.
    """

    def __init__(self, bound: float = 1.0) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            W = weight if weight.dtype == torch.float64 else weight.float()  # [out, in]
            gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W  # [n, n], n = min(out, in)
            excess = torch.linalg.eigvalsh(gram)[-1] / self.bound**2  # σ²/bound²
            return (W * excess.clamp(min=1.0).rsqrt()).to(weight.dtype)  # a factor of exactly 1 within the bound

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


def spectral_norm_linears(net: nn.Module, bound: float = 1.0) -> nn.Module:
    """Bound the largest singular value of every linear's weight in a network, in place.

    Weights above the bound are scaled down to it, W·min(1, bound/σ(W)); those below stay as they are, so that layers
    that start at zero do, unlike under `torch.nn.utils.parametrizations.spectral_norm`, which divides by σ (T. Miyato
    et al., arXiv 1802.05957). σ is exact and has its gradient. What was `weight` is saved as
    `parametrizations.weight.original`; `torch.nn.utils.parametrize.remove_parametrizations` makes plain linears again.

    Embedders of times, labels and guidance, which are the submodules with a name that ends in `_embedder`, stay as they
    are: no path from z leads through them, so they are no factor of ∂u/∂z. So does that of patches, a convolution.
    Of `MLP` the bound is one on ‖∂u/∂z‖; where a network multiplies its features by conditions, or normalises them, as
    DiT does, it bounds each linear map and not their product.

    Each use of a weight takes an eigenvalue decomposition of a matrix of its smaller side: on one core 1 ms for
    128 × 128, 80 to 150 ms for each weight of DiT-B, of which there are some sixty.

    Args:
        net: any module.
        bound: the largest singular value, > 0.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no module, or `bound` no number.
        ValueError: `bound` is not positive, `net` has no linears to bound, or one is parametrised already.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")
    check_number("bound", bound, 0, above=True)
    linears = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and not any(part.endswith("_embedder") for part in name.split("."))
    }
    if not linears:
        raise ValueError(f"net: expected linears outside of embedders, found none in {type(net).__name__}")
    for name, linear in linears.items():
        if is_parametrized(linear, "weight"):
            raise ValueError(f"net: expected plain linears, and the weight of {name} is parametrised already")
    for linear in linears.values():
        # unsafe: the check would decompose every weight, and shape and dtype are those of the weight
        register_parametrization(linear, "weight", SpectralBound(bound), unsafe=True)
    return net


def names_of_bounded(weights: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Weights of a plain network by the names that they have in `net`, if its linears are bounded."""
    renamed = {name.replace(_ORIGINAL, "weight"): name for name in net.state_dict() if name.endswith(_ORIGINAL)}
    return {renamed.get(name, name): value for name, value in weights.items()}
