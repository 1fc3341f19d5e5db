"""Checkpoints: a folder of safetensors and JSON that is either complete or not there.

    checkpoints/step_00001000/model.safetensors       weights
                              ema.safetensors         averaged weights, float32
                              optimizer.safetensors   AdamW's moments, one tensor per parameter and moment
                              rng.safetensors         states of the main process's global PyTorch generators
                              state.json              step, model, timing; written last

Batches and the objective's draws are functions of (seed, step), so the step is the data position too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ..errors import UsageError

FORMAT = 1
_NAME = re.compile(r"^step_(\d{8,})$")
_SEPARATOR = "|"  # between a parameter's name and a moment's: no module name contains it


@dataclass(frozen=True)
class Checkpoint:
    """What is saved: everything that the next step depends on."""

    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint into `folder` and remove all but the newest `keep`.

    It is written beside its place and renamed when every byte is on disk: a crash leaves the previous ones whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{checkpoint.step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in ("model", "ema", "optimizer", "rng"):
        tensors = {key: value.detach().cpu().contiguous() for key, value in getattr(checkpoint, name).items()}
        save_file(tensors, partial / f"{name}.safetensors")
    state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for path in partial.iterdir():
        _sync(path)
    if final.exists():  # the same step again, after a resume with nothing left to do
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), entry) for entry in folder.iterdir() if (m := _NAME.match(entry.name))]
    return [entry for _, entry in sorted(found) if (entry / "state.json").is_file()]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        UsageError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def load_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; an error as in `load_tensors`."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def load_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        UsageError: there is no checkpoint that this version can read.
    """
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not a checkpoint: {error}") from error
    if state.get("format") != FORMAT:
        raise UsageError(f"{path}: expected a checkpoint of format {FORMAT}, got {state.get('format')}")
    return state


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UsageError: it is missing or damaged; the message names the file.
    """
    state = load_state(path)
    parts = {name: load_tensors(path / f"{name}.safetensors") for name in ("model", "ema", "optimizer", "rng")}
    return Checkpoint(step=int(state["step"]), state=state, **parts)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load weights that must be this very model's.

    Raises:
        UsageError: names or shapes differ; the message says which.
    """
    ours = model.state_dict()
    missing = [name for name in ours if name not in weights and name != "pos_embed"]
    left_over = [name for name in weights if name not in ours]
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(ours[name].shape)}"
        for name in ours
        if name in weights and weights[name].shape != ours[name].shape
    ]
    if missing or left_over or shapes:
        found = [("lacks", missing), ("has too many", left_over), ("has other sizes", shapes)]
        what = "; it ".join(
            f"{title} {len(names)}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for title, names in found
            if names
        )
        raise UsageError(f"{source} holds another model's weights: it {what}")
    model.load_state_dict(dict(weights))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, gathered to the main process; the others take part and get nothing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    return {
        f"{name}{_SEPARATOR}{moment}": value for name, moments in state.items() for moment, value in moments.items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; hyper-parameters stay as the optimiser has them."""
    fresh = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, moment = key.split(_SEPARATOR)
        state.setdefault(name, {})[moment] = value
    set_optimizer_state_dict(
        model,
        optimizer,
        {"state": state, "param_groups": fresh["param_groups"]},  # type: ignore[dict-item]
        options=StateDictOptions(full_state_dict=True),
    )


def rng_tensors() -> dict[str, Tensor]:
    """States of this process's PyTorch generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_rng_tensors(states: Mapping[str, Tensor]) -> None:
    """Put back what `rng_tensors` gave, where this machine has such a generator."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
