"""The configuration of a run, from all that it is given: a preset or a saved run, a YAML file, flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError
from .training.config import TrainConfig

# They belong to the model that a preset names: another model has its own.
SIZES = ("hidden_size", "depth", "num_heads", "patch_size", "aux_head_depth", "prefix_tokens")

OBJECTIVES = {
    "ratio": ("meanflow", "imf"),
    "omega": ("meanflow",),
    "kappa": ("meanflow",),
    "guidance_interval": ("meanflow",),
    "cfg_beta": ("imf",),
    "omega_max": ("imf",),
    "sample_omega": ("imf",),
    "sample_interval": ("imf",),
}


def merged(
    base: TrainConfig, file: Mapping[str, Any], flags: Mapping[str, Any], *, path: Path | None = None
) -> TrainConfig:
    """`base` with the values of a file, and then those of flags. What this run has no use for is as by default.

    Args:
        base: a preset, or what a saved run was started with.
        path: of the file, for messages.

    Raises:
        UsageError: a value is out of its range, the values do not fit each other, or one that was given would have no
            effect.
    """
    given = {**file, **flags}
    sizes = dict.fromkeys(SIZES) if given.get("model", base.model) != base.model else {}
    if (
        "model" in file and flags.get("model", file["model"]) != file["model"]
    ):  # the file's sizes are those of its own model
        given = {name: value for name, value in given.items() if name not in SIZES or name in flags}
    try:
        config = dataclasses.replace(base, **{**sizes, **given})
        # a file may be a whole configuration: it asks for what differs
        asked = [name for name in given if name in flags or given[name] not in _unasked(base, name)]
        idle = _without_effect(config)
        for name in asked:
            if name in idle:
                raise UsageError(f"{name}: expected only with {idle[name]}")
        chosen = "warmup_steps" in flags or ("warmup_steps" in file and "steps" not in flags)
        if chosen and config.warmup_steps >= config.steps:
            raise UsageError(f"warmup_steps: expected less than steps = {config.steps}, got {config.warmup_steps}")
    except UsageError as error:
        name = str(error).partition(":")[0]
        where = f"config: {path}: " if name in file and name not in flags else ""
        raise UsageError(f"{where}{error}") from error
    return dataclasses.replace(config, **{name: getattr(TrainConfig, name) for name in idle})


def _unasked(base: TrainConfig, name: str) -> tuple[Any, Any]:
    """What a value is where nobody chose it."""
    return getattr(base, name), getattr(TrainConfig, name)


def _without_effect(config: TrainConfig) -> dict[str, str]:
    """Values that change nothing in this run, and what they belong to."""
    from .models import is_factory  # PyTorch

    idle = {
        name: f"objective {' or '.join(objectives)}, got objective {config.objective}"
        for name, objectives in OBJECTIVES.items()
        if config.objective not in objectives
    }
    if config.time_sampler == "uniform":
        idle |= dict.fromkeys(("time_mean", "time_std"), "time_sampler logit_normal, got uniform")
    if not (config.model.startswith("iMF-DiT") or is_factory(config.model)):
        idle |= dict.fromkeys(("aux_head_depth", "prefix_tokens"), f"an iMF-DiT, got model {config.model}")
    if config.data == "digits":
        idle |= dict.fromkeys(("image_size", "grey", "skip_unreadable"), "a folder of images, got data digits")
    if not config.compile:
        idle["compile_mode"] = "compile"
    return idle
