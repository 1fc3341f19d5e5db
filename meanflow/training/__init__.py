"""Training: a thin loop over `accelerate`, checkpoints, averages, logs and reports."""

from typing import TYPE_CHECKING

from ..lazy import imported_late

if TYPE_CHECKING:
    from .accelerator import make_accelerator
    from .checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
    from .ema import EMA
    from .folder import RunFolder
    from .loop import Trainer, TrainingError, TrainResult, parameter_count
    from .network import LoadedNetwork, load_network
    from .run import run_training
    from .schedule import learning_rate

__all__ = [
    "EMA",
    "Checkpoint",
    "LoadedNetwork",
    "RunFolder",
    "TrainResult",
    "Trainer",
    "TrainingError",
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
        "accelerator": ["make_accelerator"],
        "checkpoint": ["Checkpoint", "list_checkpoints", "load_checkpoint", "save_checkpoint"],
        "ema": ["EMA"],
        "folder": ["RunFolder"],
        "log": [],
        "loop": ["TrainResult", "Trainer", "TrainingError", "parameter_count"],
        "network": ["LoadedNetwork", "load_network"],
        "parallel": [],
        "pictures": [],
        "report": [],
        "run": ["run_training"],
        "schedule": ["learning_rate"],
        "signals": [],
    },
)
