"""Training: a thin loop over `accelerate`, checkpoints, averages, logs and reports."""

from typing import TYPE_CHECKING

from ..lazy import imported_late

if TYPE_CHECKING:
    from .build import build_model, build_objective
    from .checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
    from .config import TrainConfig
    from .ema import EMA
    from .loop import Trainer, TrainingError, TrainResult, make_accelerator, parameter_count
    from .network import LoadedNetwork, generate, load_network
    from .run import run_training
    from .schedule import learning_rate

__all__ = [
    "EMA",
    "Checkpoint",
    "LoadedNetwork",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "build_model",
    "build_objective",
    "generate",
    "learning_rate",
    "list_checkpoints",
    "load_checkpoint",
    "load_network",
    "make_accelerator",
    "parameter_count",
    "run_training",
    "save_checkpoint",
]

__getattr__, __dir__ = imported_late(
    __name__,
    {
        "build": ["build_model", "build_objective"],
        "checkpoint": ["Checkpoint", "list_checkpoints", "load_checkpoint", "save_checkpoint"],
        "config": ["TrainConfig"],
        "config_file": [],
        "ema": ["EMA"],
        "log": [],
        "loop": ["TrainResult", "Trainer", "TrainingError", "make_accelerator", "parameter_count"],
        "network": ["LoadedNetwork", "generate", "load_network"],
        "parallel": [],
        "pictures": [],
        "run": ["run_training"],
        "schedule": ["learning_rate"],
        "signals": [],
    },
)
