"""From a network of one time, such as a trained flow, to one of two: u(z, r, t, y), at first the same for every r."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfkernels import TimestepEmbedder

_FIRST, _LAST = "r_embedder.mlp.0.", "r_embedder.mlp.2."


def two_times(net: nn.Module, embedder: str) -> nn.Module:
    """A velocity network v(z, t, y) as u(z, r, t, y), which is told t − r besides: at first u = v whatever r is.

    What `embedder` makes of the time gets the embedding of t − r added, whose last layer starts at zero. The network is
    changed in place, and works inside of the new one alone: to keep it as it was, copy it first. The objectives train
    `dualize(two_times(…))`. An embedder in a part that activation checkpointing recomputes is an error.

    Args:
        net: `net(z, t, y)` of z (B, …), times t (B,) and labels y (B,); an attribute `num_classes` is taken over.
        embedder: the name of its submodule that turns the times (B,) into vectors (B, D), such as "t_embedder".

    Raises:
        ValueError: there is no such submodule, or it does not make (B, D) of (B,).
    """
    return _TwoTimes(net, embedder)


class _TwoTimes(nn.Module):
    def __init__(self, net: nn.Module, embedder: str) -> None:
        super().__init__()
        parent, _, name = embedder.rpartition(".")
        try:
            own = net.get_submodule(embedder)
        except AttributeError:
            own = net
        if own is net:
            known = ", ".join(name for name, _ in net.named_children())
            raise ValueError(f"embedder: expected the name of a submodule, such as {known}; got {embedder!r}")
        out = _embedded(own, embedder)  # [1, D]
        setattr(net.get_submodule(parent), name, _AndGap(own))
        self.net, self.r_embedder = net, TimestepEmbedder(out.shape[1]).to(out.device, out.dtype)
        self.embedder = embedder
        silence_gap(self)
        if hasattr(net, "num_classes"):
            self.num_classes = net.num_classes

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Any:
        told: Any = self.net.get_submodule(self.embedder)
        told.gap = self.r_embedder(t - r)  # [B, D]
        try:
            return self.net(z, t, y)
        finally:
            told.gap = None


@torch.no_grad()
def _embedded(module: nn.Module, name: str) -> Tensor:
    """What it makes of one time."""
    like = next(module.parameters(), torch.zeros(()))
    try:
        out = module(torch.zeros(1, dtype=like.dtype, device=like.device))
    except Exception as error:  # whatever a module says that takes no times
        raise ValueError(f"embedder: expected one of times (B,); {name} does not take them: {error}") from error
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 1:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"embedder: expected one that makes (B, D) of times (B,); of one time {name} makes {shape}")
    return out


class _AndGap(nn.Module):
    """An embedding of times, with what `_TwoTimes` has for t − r added."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder, self.gap = embedder, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.gap is None:  # of the forward that is over: a recomputed part would have no gradient through t − r
            raise RuntimeError(
                "two_times: expected times to be embedded within a forward of the network that it made; got them "
                "outside, as when activation checkpointing recomputes a part with the embedder in it. Checkpoint parts "
                "without it, and use a copy of the network where it is wanted as it was"
            )
        return self.embedder(*args, **kwargs) + self.gap  # [B, D]


@torch.no_grad()
def silence_gap(net: nn.Module) -> None:
    """Make the embedding of t − r, `net.r_embedder`, zero for every t − r, in place; it learns from there."""
    for parameter in net.get_submodule("r_embedder.mlp.2").parameters():
        parameter.zero_()


def is_told_gap(net: nn.Module | Mapping[str, Tensor]) -> bool:
    """Whether a network, or that whose weights these are, has an embedding of t − r."""
    return f"{_LAST}weight" in (net.state_dict() if isinstance(net, nn.Module) else net)


def is_of_one_time(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a DiT or SiT without an embedding of t − r."""
    return "t_embedder.mlp.2.weight" in weights and not is_told_gap(weights)


def told_both_times(weights: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Weights of a network that was trained at r = t alone, as those of `net`, which then is the same at every r.

    What the embedding of t − r had been for 0, if there was one, it is for every t − r, by its last layer. A network
    that is told no t − r (DMF-DiT) has it in the embedding of t.
    """
    ours, out = net.state_dict(), dict(weights)
    at_zero: Tensor | float = 0.0
    if is_told_gap(weights):
        first, last = ({part: weights[f"{place}{part}"] for part in ("weight", "bias")} for place in (_FIRST, _LAST))
        half = first["weight"].shape[1] // 2  # of the features at 0: cosines, which are 1; the others are sines
        hidden = nn.functional.silu(first["weight"][:, :half].double().sum(dim=1) + first["bias"].double())  # [D]
        at_zero = last["weight"].double() @ hidden + last["bias"].double()  # [D]
    if is_told_gap(weights) and is_told_gap(net) and ours[f"{_LAST}bias"].shape != weights[f"{_LAST}bias"].shape:
        return out  # of another size, which loading tells
    if is_told_gap(net):
        out |= {name: ours[name] for name in ours if name.startswith(_FIRST) and name not in out}
        out[f"{_LAST}weight"] = torch.zeros_like(ours[f"{_LAST}weight"])
        out[f"{_LAST}bias"] = torch.zeros_like(ours[f"{_LAST}bias"]) + at_zero
        out[f"{_LAST}bias"] = out[f"{_LAST}bias"].to(ours[f"{_LAST}bias"].dtype)
    elif is_told_gap(weights) and "t_embedder.mlp.2.bias" in weights:
        out = {name: value for name, value in out.items() if not name.startswith("r_embedder.")}
        bias = weights["t_embedder.mlp.2.bias"]
        out["t_embedder.mlp.2.bias"] = (bias.double() + at_zero).to(bias.dtype)  # [D]
    return out
