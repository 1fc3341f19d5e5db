"""Snapshots of a run's power averages, averages/step_00001000.safetensors, and averages that are made of them later."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from torch import Tensor

from ..errors import UsageError
from ..files import replaced
from .checkpoint import check_tensors, joined, load_tensors, parted, save_whole, sync
from .power_ema import PREFIX, combination, gamma_of, power_name
from .state import check_files, checksum

NEAR = 0.1  # of a profile's norm: where a combination misses more of it, that is said
_NAME = re.compile(r"^step_(\d{8,})\.safetensors$")
_log = logging.getLogger("meanflow")


def save_snapshot(folder: Path, step: int, averages: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the averages after `step` steps, whole, by the main process, and return its file's checksum by its name.

    Every process takes part where they are sharded.

    Raises:
        OSError: the disk does not take them.
    """
    path = folder / f"step_{step:08d}.safetensors"
    if not PartialState().is_main_process:
        save_whole(path, averages)
        return {}
    folder.mkdir(exist_ok=True)
    with replaced(path) as partial:
        save_whole(partial, averages)
        sync(partial)
    sync(folder)
    return {path.name: checksum(path)}


def step_of(name: str) -> int | None:
    """Of a snapshot's file name; None where it is none."""
    match = _NAME.match(name)
    return int(match[1]) if match else None


def remove_snapshots_after(folder: Path, step: int) -> None:
    """Remove those of later steps, which a run that goes on from `step` writes anew."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if (step_of(path.name) or 0) > step:
            path.unlink()


def post_hoc(
    path: Path, state: Mapping[str, Any], averages: Mapping[str, Mapping[str, Tensor]], weights: str
) -> dict[str, Tensor]:
    """The average of any length at the step of a checkpoint: of its own power averages and all snapshots before.

    Args:
        path: the checkpoint, in the folder of its run.
        state: its state.json.
        averages: its further averages, by their names.
        weights: "power:" and the length, σ_rel.

    Raises:
        UsageError: it is no length, the run keeps no power averages, or a snapshot is missing or damaged.
    """
    kept = {name: average for name, average in averages.items() if name.startswith(PREFIX)}
    if not kept:
        raise UsageError(f"{path} was trained without --power-ema; got {weights}", field="weights")
    try:
        wanted = float(weights.removeprefix(PREFIX))
        gamma_of(wanted)
    except ValueError as error:
        raise UsageError(
            f"expected {PREFIX} and a length, such as {power_name(0.07)}, got {weights}: {error}", field="weights"
        ) from error
    folder = path.parent.parent / "averages"
    names = sorted(name for name in state.get("snapshots", {}) if (step_of(name) or 0) < state["step"])
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UsageError(
            f"{weights} is made of the run's snapshots, and {folder} lacks {len(missing)} of {len(names)}, such as "
            f"{missing[0]}",
            field="weights",
        )
    steps = [*(step_of(name) or 0 for name in names), state["step"]]
    try:
        lengths = [float(name.removeprefix(PREFIX)) for name in kept]
        factors, missed = combination([(length, step) for step in steps for length in lengths], (wanted, state["step"]))
    except (ValueError, np.linalg.LinAlgError) as error:
        raise UsageError(f"{path / 'averages.safetensors'}: {error}") from error
    if missed > NEAR:
        _log.warning(
            "weights: the snapshots miss %s by %.0f %% of its profile's norm: it is far from %s, or they are few",
            weights,
            100 * missed,
            ", ".join(kept),
        )
    total = {name: value.new_zeros(value.shape) for name, value in next(iter(kept.values())).items()}
    remaining = iter(factors)
    for name in [*names, None]:
        snapshot = kept if name is None else _load(folder / name, state, joined(kept))
        for average in kept:
            factor = next(remaining)
            for key, value in total.items():
                value.add_(snapshot[average][key], alpha=factor)
    return total


def _load(path: Path, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> Mapping[str, Mapping[str, Tensor]]:
    """A snapshot that is as it was saved."""
    check_files(path.parent, {"checksums": state["snapshots"]}, [path.name])
    tensors = load_tensors(path)
    check_tensors(tensors, like, path)
    return parted(tensors)
