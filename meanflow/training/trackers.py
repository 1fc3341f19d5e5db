"""The experiment trackers of a run (TensorBoard, Weights & Biases, …), by accelerate. Only the main process logs.

A tracker's package is imported by accelerate when a run that logs with it begins.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from ..config import Config, Run
from ..errors import UsageError
from ..files import read_text, reason, write_text
from .folder import RunFolder

PROJECT = "meanflow"  # that runs belong to, where trackers know projects
ONE_IMAGE = ("aim", "clearml")  # trackers that take a picture by itself; the others take a batch of them


def trackers_of(run: Run) -> list[str]:
    """Names of the trackers that a run logs with.

    Raises:
        UsageError: accelerate does not know one, or it is not installed.
    """
    installed = {str(name) for name in get_available_trackers()}
    if run.tensorboard and "tensorboard" not in installed:
        raise UsageError('it is not installed: pip install "meanflow[tensorboard]"', field="tensorboard")
    names = [name for name in map(str.strip, run.log_with.split(",")) if name]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"expected some of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {name!r}", field="log_with")
        if name in LoggerType.list() and name not in installed:  # others are classes that the caller has registered
            raise UsageError(f"{name} is not installed: pip install {name}", field="log_with")
    return list(dict.fromkeys([*(["tensorboard"] if run.tensorboard else []), *names]))


def start_trackers(accelerator: Accelerator, config: Config, folder: RunFolder, step: int) -> None:
    """Begin, or after `step` steps go on, to log with the trackers of a run, and tell them its configuration.

    Raises:
        UsageError: one does not start.
    """
    names = trackers_of(config.run)
    if not names or not accelerator.is_main_process:
        return
    values = {name: _plain(value) for name, value in config.values().items()}
    try:
        # made here, each with a project of its own: accelerate by itself gives all of them one
        accelerator.log_with = [_tracker(name, config.run.name, folder, step) for name in names]
        accelerator.init_trackers(PROJECT, values)
    except Exception as error:  # whatever the packages raise: no account, no network, no disk
        accelerator.trackers = []  # one that has not started cannot finish
        raise UsageError(f"cannot log with {', '.join(names)}: {reason(error)}", field="log_with") from error


def _tracker(name: str, run: str, folder: RunFolder, step: int) -> GeneralTracker:
    """A tracker by its name, which goes on in the same curve where it can."""
    project, options = PROJECT, dict[str, Any]()
    if name == "tensorboard":
        project = name  # the folder in the run's
        options = {"purge_step": step + 1}  # rows of later steps are of a session that crashed
    elif name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        if not folder.wandb_id.is_file():
            write_text(folder.wandb_id, secrets.token_hex(8) + "\n")
        options = {"name": run, "id": read_text(folder.wandb_id).strip(), "resume": "allow", "dir": str(folder.path)}
    cls = LOGGER_TYPE_TO_CLASS[name]
    return cls(project, str(folder.path), **options) if cls.requires_logging_directory else cls(project, **options)


def _plain(value: Any) -> bool | int | float | str:
    """An option's value as every tracker takes it: TensorBoard leaves out None and takes no list."""
    if isinstance(value, bool | int | float | str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Log a picture after `step` steps with every tracker that takes one."""
    if not accelerator.is_main_process:
        return
    pixels = np.asarray(picture.convert("RGB"))  # [H, W, 3]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels if tracker.name in ONE_IMAGE else pixels[None]}, step=step, **layout)


def log_report(accelerator: Accelerator, report: Mapping[str, Any], step: int) -> None:
    """Log the numbers of a report as "report/NAME"."""
    numbers = {f"report/{key}": value for key, value in report.items() if type(value) in (int, float)}
    accelerator.log(numbers, step=step)
