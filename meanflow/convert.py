"""Weights of other programs as state dicts of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .models.two_times import is_of_one_time, is_told_gap, silence_gap

_FLAX_NAMES = (
    (r"/embedding_table/_flax_embedding/embedding$", "/embedding_table/weight"),
    (r"/_flax_linear/", "/"),
    (r"/layers_(\d+)", r"/\1"),
    (r"(^|/)(shared_blocks|u_heads|v_heads)_(\d+)/", r"\1\2/\3/"),
)


def dit_from_flax(flat: Mapping[str, Any]) -> dict[str, Tensor]:
    """The MeanFlow authors' JAX weights as a state dict of `DiT`: `net.load_state_dict(dit_from_flax(flat))`.

    Args:
        flat: '/'-joined names to arrays, such as "net/blocks/layers_0/attn/qkv/_flax_linear/kernel". Dense kernels are
            (in, out), convolution kernels (kh, kw, in, out). A leading "net/", "params/" or "param/" is dropped.

    Returns:
        State dict in float32, without the fixed position embedding, which `DiT` fills in by itself.

    Raises:
        ValueError: a name or shape is not of a MeanFlow DiT; the message names it.
    """
    renamed = {re.sub(r"(^|/)h_embedder/", r"\1r_embedder/", name): array for name, array in flat.items()}
    state = _from_flax(renamed, "a MeanFlow DiT")
    if "x_embedder.proj.weight" not in state or "final_layer.linear.weight" not in state:
        raise ValueError("flat: expected x_embedder/proj and final_layer/linear among the names of a MeanFlow DiT")
    return state


def imf_dit_from_flax(flat: Mapping[str, Any]) -> dict[str, Tensor]:
    """The improved MeanFlow authors' JAX weights as a state dict of `IMFDiT`.

    Args:
        flat: '/'-joined names to arrays, such as "net/shared_blocks_0/attn/q_proj/_flax_linear/kernel"; layouts as in
            `dit_from_flax`. The kernel of a norm is its weight (D,).

    Returns:
        State dict in float32. Weights without a v head (v_heads, v_final_layer) fit `IMFDiT(..., v_head=False)`.

    Raises:
        ValueError: a name or shape is not of an iMF-DiT; the message names it.
    """
    state = _from_flax(flat, "an iMF-DiT")
    if "x_embedder.proj.weight" not in state or "u_final_layer.linear.weight" not in state:
        raise ValueError("flat: expected x_embedder/proj and u_final_layer/linear among the names of an iMF-DiT")
    return state


def _from_flax(flat: Mapping[str, Any], model: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, array in flat.items():
        path = re.sub(r"^(?:params?/|net/)+", "", name)
        for pattern, replacement in _FLAX_NAMES:
            path = re.sub(pattern, replacement, path)
        parent, _, leaf = path.rpartition("/")
        value = torch.from_numpy(np.array(array, dtype=np.float32))
        if leaf == "kernel":
            if value.ndim not in (1, 2, 4):
                raise ValueError(f"{name}: expected a kernel of 1, 2 or 4 dimensions, got shape {tuple(value.shape)}")
            value = value if value.ndim == 1 else value.mT if value.ndim == 2 else value.permute(3, 2, 0, 1)
            leaf = "weight"
        elif leaf not in ("bias", "weight") and not leaf.endswith(("_tokens", "_scale")):
            raise ValueError(f"{name}: not a weight of {model}")
        state[".".join(part for part in (*parent.split("/"), leaf) if part)] = value.contiguous()
    return state


_TARFLOW_NAMES = (
    (r"^(blocks\.\d+\.)attn_blocks\.(\d+)\.", r"\1layers.\2."),
    (r"\.attention\.norm\.", ".norm1."),
    (r"\.attention\.(qkv|proj)\.", r".attn.\1."),
    (r"\.mlp\.norm\.", ".norm2."),
    (r"\.mlp\.main\.0\.", ".mlp.fc1."),
    (r"\.mlp\.main\.2\.", ".mlp.fc2."),
)
_TARFLOW_LEAVES = re.compile(
    r"blocks\.\d+\.(pos_embed|class_embed|(proj_in|proj_out|layers\.\d+\.(norm1|norm2|attn\.(qkv|proj)|mlp\.fc[12]))"
    r"\.(weight|bias))"
)


def tarflow_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The TarFlow authors' PyTorch weights as a state dict of `TarFlow`.

    Args:
        state: names to tensors or arrays, such as "blocks.0.attn_blocks.1.attention.qkv.weight" (out, in); wrappers'
            prefixes as in `load_dit`. "var" (N, C·p·p) is the prior's variance, which `TarFlow(nvp=False)` holds as its
            logarithm; the prior of a network with nvp has none, and its ones are left out.

    Returns:
        State dict in the dtypes of `state`.

    Raises:
        ValueError: a name or shape is not of a TarFlow, or a variance is not positive; the message says which.
    """
    ours: dict[str, Tensor] = {}
    for theirs, value in unwrapped(state).items():
        a = torch.as_tensor(value).detach()
        name = plain_name(theirs)
        for pattern, replacement in _TARFLOW_NAMES:
            name = re.sub(pattern, replacement, name)
        if name == "var":
            if a.ndim != 2 or not bool((a > 0).all()):
                raise ValueError(f"var: expected positive variances of shape (N, C·p·p), got shape {tuple(a.shape)}")
            ours["log_var"] = a.log()  # [N, C·p·p]
        elif not _TARFLOW_LEAVES.fullmatch(name):
            raise ValueError(f"{theirs}: not a weight of a TarFlow")
        elif name.endswith("class_embed"):
            if a.ndim != 3 or a.shape[1] != 1:
                raise ValueError(f"{theirs}: expected shape (K, 1, D), got {tuple(a.shape)}")
            ours[name] = a[:, 0]  # [K, D]
        else:
            ours[name] = a
    if "blocks.0.proj_out.weight" not in ours:
        raise ValueError("state: expected blocks.0.proj_out.weight among the names of a TarFlow")
    scaled = ours["blocks.0.proj_out.weight"].shape[0] == 2 * ours["blocks.0.proj_in.weight"].shape[1]
    if scaled:
        ours.pop("log_var", None)
    return ours


@dataclass(frozen=True)
class LoadReport:
    """What `load_dit` did: loaded, missing (of the model, kept as they were), left over (of the file), wrong_shape."""

    loaded: list[str]
    missing: list[str]
    left_over: list[str]
    wrong_shape: list[str]

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors"]
        for title, names in (
            ("missing, kept as initialised", self.missing),
            ("left over, not used", self.left_over),
            ("of another shape, not used", self.wrong_shape),
        ):
            if names:
                lines.append(f"{title} ({len(names)}): {', '.join(names)}")
        if any(name.startswith("r_embedder.") for name in self.missing):
            lines.append("the embedding of t − r starts silent: the network is the same at every r")
        return "\n".join(lines)


def unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in a training program's file: the averaged ones where it has them."""
    return next((state[key] for key in ("ema", "model", "state_dict") if isinstance(state.get(key), Mapping)), state)


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers added to it: prefixes, and the layers that the authors' ports keep."""
    name = re.sub(r"^(?:module\.|_orig_mod\.|model\.|net\.)+", "", name)
    return re.sub(r"\._flax_(?:linear|embedding)\.", ".", name)


def load_dit(model: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """Load a public DiT, SiT or iMF-DiT state dict into `model` wherever name and shape agree.

    Wrappers' prefixes ("module.", "_orig_mod.", "model.", "net."), the "_flax_linear" and "_flax_embedding" layers of
    the improved MeanFlow authors' PyTorch weights, and a surrounding {"ema": …} or {"model": …} are removed. Those
    weights have no v head: they fit `IMFDiT(..., v_head=False)`.
    Where they have no embedding of t − r and `model` has one, that starts silent: u is the same at every r. DiT
    predicts noise and SiT the velocity of a path whose time runs the other way (see `in_our_time`); loaded weights are
    a starting point for training, not a MeanFlow model. The learned-sigma half of `final_layer.linear`, if there is
    one, is dropped.

    Returns:
        A `LoadReport`; print it to see what is missing or left over.

    Raises:
        ValueError: nothing fits.
    """
    theirs = {plain_name(name): value for name, value in unwrapped(state).items()}
    ours = model.state_dict()
    _drop_sigma(theirs, ours)
    loaded, wrong_shape = [], []
    for name in ours:
        if name in theirs:
            if theirs[name].shape == ours[name].shape:
                loaded.append(name)
            else:
                wrong_shape.append(f"{name} {tuple(theirs[name].shape)} instead of {tuple(ours[name].shape)}")
    if not loaded:
        raise ValueError(f"state: no tensor fits the model; it has names such as {', '.join(list(theirs)[:3])}")
    model.load_state_dict({name: theirs[name] for name in loaded}, strict=False)
    if is_of_one_time(theirs) and is_told_gap(model):
        silence_gap(model)
    return LoadReport(
        loaded=loaded,
        missing=[name for name in ours if name not in theirs],
        left_over=[name for name in theirs if name not in ours],
        wrong_shape=wrong_shape,
    )


def in_our_time(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SiT's weights, whose time runs from noise at 0 to data at 1, as those of the same network in our time.

    Ours at (z, t) is minus theirs at (z, 1 − t), exactly: cosines and sines of (1 − t)·ω are linear in those of t·ω,
    so that the first layer of the time's embedding takes the change in; the last layer's sign is turned.

    Args:
        state: a SiT's state dict, as for `load_dit`.

    Raises:
        ValueError: it has no `t_embedder.mlp.0` of an even number of features, or no `final_layer.linear`.
    """
    state = {plain_name(name): value for name, value in unwrapped(state).items()}
    first, last = "t_embedder.mlp.0.weight", "final_layer.linear"
    if is_told_gap(state):
        raise ValueError("state: expected the weights of a SiT, which has one time; got an embedding of t − r as well")
    missing = [name for name in (first, f"{last}.weight", f"{last}.bias") if name not in state]
    if missing or state[first].ndim != 2 or state[first].shape[1] % 2:
        got = missing[0] if missing else f"{first} {tuple(state[first].shape)}"
        raise ValueError(f"state: expected {first} of shape (D, even) and {last} of a SiT, got no such {got}")
    W = state[first].double()  # [D, F]
    half = W.shape[1] // 2
    ω = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)  # [F/2]
    of_cos, of_sin = W[:, :half], W[:, half:]  # [D, F/2] each
    turned = torch.cat([of_cos * ω.cos() + of_sin * ω.sin(), of_cos * ω.sin() - of_sin * ω.cos()], dim=1)  # [D, F]
    changed = {first: turned.to(state[first].dtype)}
    changed |= {name: -state[name] for name in (f"{last}.weight", f"{last}.bias")}
    return {**state, **changed}


def _drop_sigma(theirs: dict[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """DiT with learn_sigma has, per pixel of a patch, 2·C outputs: the first C are the mean."""
    head, proj = "final_layer.linear", "x_embedder.proj.weight"
    w = theirs.get(f"{head}.weight")
    if w is None or proj not in ours or w.shape[0] != 2 * ours[f"{head}.weight"].shape[0]:
        return
    C = ours[proj].shape[1]
    for name in (f"{head}.weight", f"{head}.bias"):
        a = theirs[name]
        theirs[name] = a.unflatten(0, (-1, 2 * C))[:, :C].flatten(0, 1)
