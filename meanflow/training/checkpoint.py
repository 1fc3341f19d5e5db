"""Checkpoints: a folder of safetensors and JSON that is either complete or not there.

    checkpoints/step_00001000/model.safetensors       weights
                              ema.safetensors         averaged weights, float32
                              optimizer.safetensors   AdamW's moments, one tensor per parameter and moment
                              shares/                 under FSDP2, instead of optimizer.safetensors: weights, averages
                                                      and moments, written by torch.distributed.checkpoint, each
                                                      process's pieces in a file of its own
                              state.json              step, model, timing; written last

Either kind is resumed by any number of processes, with DDP or FSDP2. Batches and all draws are functions of (seed,
step), so the step is the data position and the state of every random generator too.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from .parallel import spread_like, whole

FORMAT = 1
_NAME = re.compile(r"^step_(\d{8,})$")
_SEPARATOR = "|"  # between a parameter's name and a moment's: no module name contains it
_SHARED = ("model", "ema", "optimizer")  # parts that FSDP2 spreads over the processes


@dataclass(frozen=True)
class Checkpoint:
    """What is saved: everything that the next step depends on. Tensors may be spread over the processes (FSDP2)."""

    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> bool:
        """Whether every process holds a piece only; then every process takes part in saving and loading."""
        return any(isinstance(value, DTensor) for value in self.model.values())

    @property
    def shares(self) -> dict[str, Tensor]:
        """What may be spread, by part and name."""
        return {f"{part}{_SEPARATOR}{name}": value for part in _SHARED for name, value in getattr(self, part).items()}


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint into `folder`, which then holds the newest `keep`.

    It is written beside its place and renamed when every byte is on disk: a crash leaves the previous ones whole. What
    is not kept goes first, so that the disk needs room for `keep`, but for two where that is one: the last whole
    checkpoint stays until the new one is. The main process calls this, or all do where the checkpoint is spread.
    """
    main = PartialState().is_main_process
    final = folder / f"step_{checkpoint.step:08d}"
    partial = folder / f".{final.name}.partial"
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _remove_older(folder, final, keep=max(1, keep - 1))
        partial.mkdir()
    if checkpoint.spread:
        PartialState().wait_for_everyone()  # for the folder
        _save_shares(partial / "shares", checkpoint.shares)
    for name in ("model", "ema") if checkpoint.spread else _SHARED:
        tensors: dict[str, Tensor] = {}
        places = set()
        for key, value in getattr(checkpoint, name).items():
            value = whole(value.detach())
            if main:
                value = value.cpu().contiguous()
                # safetensors takes no memory twice, and tied parameters have two names
                tensors[key] = value.clone() if value.untyped_storage().data_ptr() in places else value
                places.add(value.untyped_storage().data_ptr())
        if main:
            try:
                save_file(tensors, partial / f"{name}.safetensors")
            except SafetensorError as error:  # a full disk
                raise OSError(f"cannot write {partial / name}.safetensors: {error}") from error
    if not main:
        return final
    state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for path in partial.rglob("*"):
        _sync(path)
    if final.exists():  # the same step again, after a resume with nothing left to do
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync(folder)
    _remove_older(folder, final, keep=keep - 1)
    return final


def _remove_older(folder: Path, final: Path, *, keep: int) -> None:
    """Remove all checkpoints but `final` and the newest `keep` of the others."""
    others = [path for path in list_checkpoints(folder) if path != final]
    for old in others[: max(0, len(others) - keep)]:
        shutil.rmtree(old)


def remove_partial(folder: Path) -> None:
    """Remove checkpoints that were begun and not finished; none may be in the making."""
    for partial in folder.glob(".step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _save_shares(path: Path, shares: dict[str, Tensor]) -> None:
    try:
        dcp.save(shares, checkpoint_id=path)
    except CheckpointException as error:
        raise OSError(f"cannot write {path}: {_cause(error)}") from error


def _cause(error: CheckpointException) -> str:
    """The first of the processes' errors, without its traceback."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"{cause} (process {rank})"


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


def load_state(path: Path, *names: str) -> dict[str, Any]:
    """state.json of a checkpoint, which has these names besides step and format.

    Raises:
        UsageError: there is no checkpoint that this version can read.
    """
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a checkpoint: cannot read its state.json: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UsageError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}")
    missing = [name for name in ("step", *names) if name not in state]
    if missing:
        raise UsageError(f"{path} is not a checkpoint: its state.json lacks {', '.join(missing)}")
    return state


def load_checkpoint(path: Path, like: Checkpoint | None = None) -> Checkpoint:
    """Read a checkpoint, by any number of processes.

    Args:
        path: its folder.
        like: what this run holds now: tensors of its names and shapes come back spread over the processes as its are.
            Default: every tensor whole.

    Raises:
        UsageError: it is missing or damaged; the message names the file.
    """
    state = load_state(path)
    held = like.shares if like else {}
    if (path / "shares").is_dir():
        shares = _load_shares(path / "shares", held)
    else:
        shares = {
            f"{part}{_SEPARATOR}{name}": value
            for part in _SHARED
            for name, value in load_tensors(path / f"{part}.safetensors").items()
        }
        for key, value in shares.items():
            if key in held and held[key].shape == value.shape:
                shares[key] = spread_like(value, held[key])
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _SHARED}
    for key, value in shares.items():
        part, name = key.split(_SEPARATOR, 1)
        parts[part][name] = value
    return Checkpoint(step=int(state["step"]), state=state, **parts)


def _load_shares(path: Path, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shares: dict[str, Any] = {}
    for key, saved in _read_metadata(path).state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        if key in held and held[key].shape == saved.size:
            shares[key] = torch.empty_like(held[key])
        else:
            shares[key] = torch.empty(saved.size, dtype=saved.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # a single process: that is meant
            dcp.load(shares, checkpoint_id=path)
    except CheckpointException as error:
        raise UsageError(f"cannot read {path}: {_cause(error)}") from error
    return shares


def _read_metadata(path: Path) -> dcp.Metadata:
    try:
        return dcp.FileSystemReader(path).read_metadata()
    # a damaged pickle raises what it happens to run into
    except (OSError, EOFError, LookupError, ValueError, AttributeError, ImportError, pickle.UnpicklingError) as error:
        raise UsageError(f"cannot read {path / '.metadata'}: {error}") from error


def cure_for_damage(folder: Path, path: Path) -> str:
    """What to do where the checkpoint `path` in `folder` is damaged; empty where no older one is whole."""
    damaged: list[Path] = []
    for other in reversed(list_checkpoints(folder)):
        if other != path and _is_intact(other):
            return f". {other} is intact: remove {' and '.join(map(str, damaged))} to continue from there"
        damaged.append(other)
    return ""


def _is_intact(path: Path) -> bool:
    """Whether all files are there and as long as they should be."""
    try:
        load_state(path)
        names = {"model", "ema"}
        if (path / "shares").is_dir():
            for place in _read_metadata(path / "shares").storage_data.values():
                if (path / "shares" / place.relative_path).stat().st_size < place.offset + place.length:
                    return False
        else:
            names.add("optimizer")
        for name in names:
            load_metadata(path / f"{name}.safetensors")  # reads the header, which must fit the file's length
    except (OSError, UsageError):
        return False
    return True


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


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    """Raise unless `found`, read from `source`, has every expected tensor in its shape."""
    wrong = [name for name, value in expected.items() if name not in found or found[name].shape != value.shape]
    if wrong:
        raise UsageError(f"{source}: {len(wrong)} tensors are missing or of another shape, such as {wrong[0]}")


def parameter_of(key: str) -> str:
    """The parameter that an optimiser's tensor belongs to."""
    return key.rpartition(_SEPARATOR)[0]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, spread as the parameters are.

    Every process takes part. Where no step has been made it is filled in with placeholders.
    """
    state: Any = get_optimizer_state_dict(model, optimizer).get("state", {})
    return {
        f"{name}{_SEPARATOR}{moment}": value for name, moments in state.items() for moment, value in moments.items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; hyper-parameters stay as the optimiser has them."""
    groups: Any = get_optimizer_state_dict(model, optimizer)["param_groups"]
    # a parameter that never had a gradient has no moments; torch 2.6 asks for its name all the same
    state: dict[str, dict[str, Tensor]] = {name: {} for group in groups for name in group["params"]}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(_SEPARATOR)
        state.setdefault(name, {})[moment] = value
    set_optimizer_state_dict(
        model,
        optimizer,
        {"state": state, "param_groups": groups},  # type: ignore[dict-item]
    )
