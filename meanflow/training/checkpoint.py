"""Checkpoints: a folder of safetensors and JSON that is either complete or not there.

    checkpoints/step_00001000/model.safetensors       weights
                              ema.safetensors         averaged weights, float32
                              optimizer.safetensors   AdamW's moments, one tensor per parameter and moment
                              averages.safetensors    further averages of the parameters, "DECAY|name", if there are any
                              learned.safetensors     parameters of the objective, if it has any
                              target.safetensors      averaged copy of the network that makes targets, if there is one
                              shards/                 under FSDP2, instead of optimizer, learned and target: all of
                                                      these tensors, written by torch.distributed.checkpoint, each
                                                      process's shards in a file of its own
                              state.json              step, model, timing, checksums of the others; written last

Either kind is resumed by any number of processes, with DDP or FSDP2. Batches and all draws are functions of (seed,
step), so the step is the data position and the state of every random generator too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from ..files import check_regular, reason, remove_folder
from . import shards
from .parallel import distribute_like, full_tensor, local_shard
from .state import check_files, checksum, has_file, load_state, save_state

_NAME = re.compile(r"^step_(\d{8,})$")
_SEPARATOR = "|"  # between a parameter's name and a moment's: no module name contains it
T = TypeVar("T")
_PARTS = ("model", "ema", "averages", "optimizer", "learned", "target")  # of a checkpoint
_OF_SOME = ("averages", "learned", "target")  # those that some runs have
_WHOLE = ("model", "ema", "averages")  # those that are whole tensors in any case, so that a network can be loaded
_NETWORK, _LEARNED = "net.", "learned."  # where parameters are in a `TrainingLoss`


@dataclass(frozen=True)
class Checkpoint:
    """What is saved: everything that the next step depends on. Tensors may be sharded over the processes (FSDP2)."""

    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    target: Mapping[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether each process holds its shards only; then every process takes part in saving and loading."""
        return any(isinstance(value, DTensor) for value in self.model.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by "part|name"."""
        return joined({part: getattr(self, part) for part in _PARTS})


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several parts by "part|name"."""
    return {f"{part}{_SEPARATOR}{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def parted(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors that are `joined` by part and name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition(_SEPARATOR)
        parts.setdefault(part, {})[name] = value
    return parts


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint into `folder`, which then holds the newest `keep`.

    It is written beside its place and renamed when every byte is on disk: a crash leaves the previous ones whole. What
    is not kept goes first, so that the disk needs room for `keep`, but for two where that is one: the last whole
    checkpoint stays until the new one is. The main process calls this, or all do where the checkpoint is sharded.
    """
    main = PartialState().is_main_process
    final = folder / f"step_{checkpoint.step:08d}"
    partial = folder / f".{final.name}.partial"
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        _remove_older(folder, final, keep=max(1, keep - 1))
        partial.mkdir()
    checksums = {}
    if checkpoint.sharded:
        PartialState().wait_for_everyone()  # for the folder
        checksums = shards.save_shards(partial / shards.FOLDER, checkpoint.tensors)
    for name in _WHOLE if checkpoint.sharded else _PARTS:
        if getattr(checkpoint, name):
            save_whole(partial / f"{name}.safetensors", getattr(checkpoint, name))
            if main:
                checksums[f"{name}.safetensors"] = checksum(partial / f"{name}.safetensors")
    if not main:
        return final
    save_state(partial, {"step": checkpoint.step, **checkpoint.state}, checksums)
    for path in partial.rglob("*"):
        sync(path)
    if final.exists():  # the same step again
        remove_folder(final)
    os.replace(partial, final)
    sync(folder)
    _remove_older(folder, final, keep=keep - 1)
    return final


def save_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file by the main process, of tensors that may be sharded; then every process takes part.

    Raises:
        OSError: the disk does not take it.
    """
    main = PartialState().is_main_process
    whole: dict[str, Tensor] = {}
    places = set()
    for key, value in tensors.items():
        value = full_tensor(value.detach())
        if main:
            value = value.cpu().contiguous()
            # safetensors takes no memory twice, and tied parameters have two names
            whole[key] = value.clone() if value.untyped_storage().data_ptr() in places else value
            places.add(value.untyped_storage().data_ptr())
    if main:
        try:
            save_file(whole, path)
        except SafetensorError as error:  # a full disk
            raise OSError(f"cannot write {path}: {error}") from error


def _remove_older(folder: Path, final: Path, *, keep: int) -> None:
    """Remove all checkpoints but `final` and the newest `keep` of the others."""
    others = [path for path in list_checkpoints(folder) if path != final]
    for old in others[: max(0, len(others) - keep)]:
        remove_folder(old)


def remove_partial(folder: Path) -> None:
    """Remove checkpoints that were begun and not finished; none may be in the making."""
    for partial in folder.glob(".step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first; each was complete once, and one without a state.json is damaged."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), entry) for entry in folder.iterdir() if entry.is_dir() and (m := _NAME.match(entry.name))]
    return [entry for _, entry in sorted(found)]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        UsageError: it is missing or damaged.
    """
    return _read(path, load_file)


def load_shapes(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, without their values (on the meta device); an error as in `load_tensors`."""

    def shapes(path: Path) -> dict[str, Tensor]:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118

    return _read(path, shapes)


def load_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; an error as in `load_tensors`."""

    def metadata(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}

    return _read(path, metadata)


def _read(path: Path, read: Callable[[Path], dict[str, T]]) -> dict[str, T]:
    try:
        check_regular(path)
        return read(path)
    # RuntimeError, ValueError, LookupError, AttributeError: a dtype or shape that PyTorch has not
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError, AttributeError) as error:
        raise UsageError(f"cannot read {path}: {reason(error)}") from error


def load_checkpoint(path: Path, like: Checkpoint | None = None) -> Checkpoint:
    """Read a checkpoint, by any number of processes.

    Args:
        path: its folder.
        like: what this run holds now: tensors of its names and shapes come back sharded as its are. Default: every
            tensor whole.

    Raises:
        UsageError: it is missing or damaged; the message names the file.
    """
    state = load_state(path)
    held = like.tensors if like else {}
    folder = shards.folder_of(path)
    if folder is not None:
        tensors = shards.load_shards(folder, state, held)
    else:
        written = _written(path, state)
        check_files(path, state, [f"{part}.safetensors" for part in written])
        tensors = joined({part: load_tensors(path / f"{part}.safetensors") for part in written})
        for key, value in tensors.items():
            if key in held and held[key].shape == value.shape:
                tensors[key] = distribute_like(value, held[key])
    parts = parted(tensors)
    for part in parts:
        if part not in _PARTS:
            raise UsageError(f"{path}: expected tensors of {', '.join(_PARTS)}, got {part}")
    return Checkpoint(step=int(state["step"]), state=state, **{part: parts.get(part, {}) for part in _PARTS})


def _written(path: Path, state: Mapping[str, Any]) -> list[str]:
    """The parts of a checkpoint that are files of their own."""
    parts = _PARTS if shards.folder_of(path) is None else _WHOLE
    return [part for part in parts if part not in _OF_SOME or has_file(path, state, f"{part}.safetensors")]


def cure_for_damage(folder: Path, path: Path) -> str:
    """What to do where the checkpoint `path` in `folder` is damaged; empty where no older one is whole."""
    damaged: list[Path] = []
    for other in reversed(list_checkpoints(folder)):
        if other != path and _is_intact(other):
            return f". {other} is intact: remove {' and '.join(map(str, damaged))} to continue from there"
        damaged.append(other)
    return ""


def _is_intact(path: Path) -> bool:
    """Whether all files are there, as long as they should be, and those that were saved."""
    try:
        state = load_state(path, "seconds", "class_names", "model", "objective")
        names = [f"{part}.safetensors" for part in _written(path, state)]
        folder = shards.folder_of(path)
        if folder is not None:
            metadata = shards.read_metadata(folder)  # the files must be as long as it says
            check_files(path, state, [f"{folder.name}/{shards.METADATA}", *shards.files_of(folder, metadata)])
        for name in names:
            load_metadata(path / name)  # reads the header, which must fit the file's length
        check_files(path, state, names)
    except UsageError:
        return False
    return True


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load weights that must be this very model's; every process takes part where they are sharded.

    Raises:
        UsageError: names, shapes or kinds differ, or a parameter is not finite; the message says which.
    """
    ours = model.state_dict()
    check_weights(ours, weights, source)
    check_finite({name: weights[name] for name, _ in model.named_parameters() if name in weights}, source)
    model.load_state_dict(dict(weights))


def check_weights(ours: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: Path) -> None:
    """Raise unless `weights`, read from `source`, have the names, shapes and kinds of `ours`."""
    missing = [name for name in ours if name not in weights and name != "pos_embed"]
    left_over = [name for name in weights if name not in ours]
    both = [(name, weights[name], ours[name]) for name in ours if name in weights]
    shapes = [f"{name} {tuple(a.shape)} instead of {tuple(b.shape)}" for name, a, b in both if a.shape != b.shape]
    kinds = [f"{name} {a.dtype} instead of {b.dtype}" for name, a, b in both if _kind(a) != _kind(b)]
    if missing or left_over or shapes or kinds:
        found = [
            ("lacks", missing),
            ("has too many", left_over),
            ("has other sizes", shapes),
            ("has other kinds", kinds),
        ]
        what = "; it ".join(
            f"{title} {len(names)}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for title, names in found
            if names
        )
        raise UsageError(f"{source} holds another model's weights: it {what}")


def _kind(tensor: Tensor) -> str:
    """Of its dtype: what is not converted to another without a loss that nobody asked for."""
    if tensor.is_floating_point():
        return "floating-point"
    return str(tensor.dtype) if tensor.is_complex() or tensor.dtype is torch.bool else "integer"


def check_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise, in every process, unless tensors that were read from `source` are finite."""
    bad = not_finite(tensors)
    if bad:
        raise UsageError(f"{source}: {bad[0]}: expected finite numbers, got NaN or infinity")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those with NaN or infinity; every process takes part where they are sharded."""
    bad = [name for name, value in tensors.items() if not local_shard(value.detach()).isfinite().all()]
    return shards.from_all(bad) if any(isinstance(value, DTensor) for value in tensors.values()) else bad


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    """Raise unless `found`, read from `source`, has every expected tensor in its shape and kind, and it is finite."""
    wrong = [
        name
        for name, value in expected.items()
        if name not in found or found[name].shape != value.shape or _kind(found[name]) != _kind(value)
    ]
    if wrong:
        raise UsageError(f"{source}: {len(wrong)} tensors are missing or of another shape or kind, such as {wrong[0]}")
    check_finite({name: found[name] for name in expected}, source)


def parameter_of(key: str) -> str:
    """The parameter that an optimiser's tensor belongs to."""
    return key.rpartition(_SEPARATOR)[0]


def _in_file(name: str) -> str:
    """The name in a checkpoint of a parameter of a `TrainingLoss`: the network's own, or "learned|…"."""
    if name.startswith(_LEARNED):
        return f"learned{_SEPARATOR}{name.removeprefix(_LEARNED)}"
    return name.removeprefix(_NETWORK)


def optimizer_tensors(loss_of: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, sharded as the parameters are.

    Every process takes part. Where no step has been made it is filled in with placeholders.

    Args:
        loss_of: the `TrainingLoss` whose parameters it steps, or a wrapper of it.
    """
    state: Any = get_optimizer_state_dict(loss_of, optimizer).get("state", {})
    return {
        f"{_in_file(name)}{_SEPARATOR}{moment}": value
        for name, moments in state.items()
        for moment, value in moments.items()
    }


def load_optimizer_tensors(loss_of: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; hyper-parameters stay as the optimiser has them."""
    groups: Any = get_optimizer_state_dict(loss_of, optimizer)["param_groups"]
    # a parameter that never had a gradient has no moments; torch 2.6 asks for its name all the same
    state: dict[str, dict[str, Tensor]] = {name: {} for group in groups for name in group["params"]}
    of_file = {_in_file(name): name for name in state}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(_SEPARATOR)
        state[of_file[name]][moment] = value
    set_optimizer_state_dict(
        loss_of,
        optimizer,
        {"state": state, "param_groups": groups},  # type: ignore[dict-item]
    )
