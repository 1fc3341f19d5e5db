"""Weight files of other programs, rewritten as safetensors that name their model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .convert import dit_from_flax, imf_dit_from_flax, in_our_time, load_dit, plain_name, unwrapped
from .errors import UsageError
from .files import check_regular, reason, replaced
from .models import create_model


def dit_config(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Sizes of the DiT whose state dict this is.

    Args:
        state: with DiT's own names, whatever prefix stands before them.
        num_heads: nothing in the weights tells; default: DiT's own, 16 at width 1152, else width / 64.
        input_size: default: from `pos_embed`, where the state has it, else 32.

    Raises:
        UsageError: it is not a DiT's.
    """
    prefix = next(
        (key.removesuffix("x_embedder.proj.weight") for key in state if key.endswith("x_embedder.proj.weight")), None
    )
    if prefix is None:
        raise UsageError(f"expected the weights of a DiT (x_embedder.proj.weight …), got {', '.join(list(state)[:3])}")
    width, channels, patch, _ = state[f"{prefix}x_embedder.proj.weight"].shape
    blocks = [int(m[1]) for key in state if (m := re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", key))]
    table = state.get(f"{prefix}y_embedder.embedding_table.weight")
    if table is None or not blocks or max(blocks) >= len(state):
        raise UsageError("expected the weights of a class-conditional DiT (y_embedder.embedding_table, blocks.0 …)")
    if input_size is None:
        positions = state.get(f"{prefix}pos_embed")
        input_size = 32 if positions is None else patch * round(positions.shape[1] ** 0.5)
    hidden = state.get(f"{prefix}blocks.0.mlp.fc1.weight")
    return {
        "input_size": input_size,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": max(blocks) + 1,
        "num_heads": num_heads or (16 if width == 1152 else max(1, width // 64)),
        "mlp_ratio": 4.0 if hidden is None else hidden.shape[0] / width,
        "num_classes": table.shape[0] - 1,
    }


def imf_dit_config(state: Mapping[str, Tensor], *, input_size: int | None = None) -> dict[str, Any]:
    """Sizes of the iMF-DiT whose state dict this is; every one but `input_size` (default 32) is in the weights.

    Raises:
        UsageError: it is not an iMF-DiT's.
    """
    shapes = {plain_name(name): tuple(value.shape) for name, value in state.items()}
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        (head_dim,) = shapes["u_heads.0.attn.q_norm.weight"]
        hidden = shapes["u_heads.0.mlp.w1.weight"][0]
        tokens = {f"num_{ours}_tokens": shapes[f"{theirs}_tokens"][0] for ours, theirs in _TOKENS.items()}
        num_classes = shapes["y_embedder.embedding_table.weight"][0] - 1
    except (KeyError, ValueError) as error:
        raise UsageError(f"expected the weights of an iMF-DiT, but {error} is missing or of another shape") from error

    def blocks(kind: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})

    return {
        "input_size": 32 if input_size is None else input_size,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": blocks("shared_blocks") + blocks("u_heads"),
        "num_heads": width // head_dim,
        "num_classes": num_classes,
        "aux_head_depth": blocks("u_heads"),
        **tokens,
        "mlp_ratio": 8 / 3 if int(width * (8 / 3)) == hidden else (hidden + 0.5) / width,
        "v_head": any(name.startswith("v_final_layer.") for name in shapes),
    }


_TOKENS = {"class": "class", "time": "time", "cfg": "omega", "interval": "t_min"}


def _is_imf(names: Iterable[str]) -> bool:
    return any(re.search(r"u_final_layer[./]", name) for name in names)


def _load(source: Path) -> Mapping[str, Any]:
    if source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as arrays:
            from_flax = imf_dit_from_flax if _is_imf(arrays.files) else dit_from_flax
            return from_flax({name: arrays[name] for name in arrays.files})
    if source.suffix == ".safetensors":
        return load_file(source)
    state = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(f"expected a state dict, got {type(state).__name__}")
    return state


def convert_file(
    source: Path, out: Path, *, num_heads: int | None = None, input_size: int | None = None, reversed_time: bool = False
) -> str:
    """Read the weights in `source`, write them to `out`; returns what was done, in words.

    Args:
        reversed_time: they are a SiT's, whose time runs from noise to data; see `in_our_time`.

    Raises:
        UsageError: the file cannot be read, is neither a DiT's nor an iMF-DiT's, or `out` cannot be written.
    """
    if source.suffix not in (".npz", ".safetensors", ".pt", ".pth"):
        raise UsageError(f"weights: expected a .npz, .pt, .pth or .safetensors file, got {source}")
    try:
        check_regular(source)
        state = _load(source)
    except Exception as error:  # damaged bytes raise anything from KeyError to UnpicklingError
        what = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"weights: cannot read {source}: {what}{reason(error)}") from error
    state = unwrapped(state)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    try:
        if reversed_time:
            state = tensors = in_our_time(tensors)
        if _is_imf(tensors):
            name, config = "iMF-DiT", imf_dit_config(tensors, input_size=input_size)
        else:
            name, config = "DiT", dit_config(tensors, num_heads=num_heads, input_size=input_size)
        net = create_model(name, **config)
        report = load_dit(net, state)
    # LookupError and so on: names, shapes or values that no such model has
    except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UsageError(f"weights: {source}: {reason(error)}") from error
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as partial:
            save_file(weights, partial, metadata={"model": json.dumps({"name": name, "config": config})})
    except (OSError, SafetensorError) as error:
        raise UsageError(f"out: cannot write {out}: {error}") from error
    sizes = ", ".join(f"{key} {value:g}" for key, value in config.items())
    return f"{report}\n{name} ({sizes}) written to {out}"
