"""Training: a thin loop over `accelerate`, checkpoints, averages, logs and reports."""

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
