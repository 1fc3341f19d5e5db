"""Everything a training run depends on, in one place."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..files import shown

RUNS = Path("runs")
EVALUATION_SAMPLES = 2000
# More would be a slip that takes all memory or time before anything is said.
_MOST = {
    "image_size": 2**15,
    "workers": 1024,
    "threads": 1024,
    "hidden_size": 2**20,
    "depth": 10_000,
    "aux_head_depth": 10_000,
    "num_heads": 2**20,
    "patch_size": 2**15,
    "batch_size": 2**24,
}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Every value is a flag of `meanflow train` and a key of its YAML file."""

    # data
    data: str = ""  # "digits" (comes with scikit-learn), or a folder of images with one sub-folder per class
    image_size: int = 32  # side in pixels: images are scaled to it on their shorter side and cut to the centre
    grey: bool = False  # one grey channel instead of RGB
    flip: bool = False  # mirror half of the images, drawn anew each time
    held_out: float = 0.0  # share of each class kept out of training, for the report's reference values
    # an image that cannot be read: go on with another of its class in its place (`meanflow data check` names them all)
    skip_unreadable: bool = False
    workers: int = 2  # processes that decode images, when there are too many to keep in memory

    # model
    model: str = "DiT-S/4"  # DiT-{S,B,M,L,XL}/{2,4,8}, iMF-DiT-{B,M,L,XL}/2; or your own "package.module:function"
    hidden_size: int | None = None  # width; None: as the model's name says
    depth: int | None = None  # number of blocks; None: as the model's name says
    num_heads: int | None = None  # attention heads; None: as the model's name says
    patch_size: int | None = None  # side of a patch; None: as the model's name says
    aux_head_depth: int | None = None  # iMF-DiT: blocks of each head, out of depth; None: as the model's name says
    prefix_tokens: tuple[int, int, int, int] | None = None  # iMF-DiT: for label, t - r, omega, each end; None: 8 4 4 2
    init: str | None = None  # safetensors file of weights to start from (see meanflow convert); None: random

    # objective

    # average velocity (one step), the same at any guidance scale (improved MeanFlow), or plain velocity (ODE)
    objective: Literal["meanflow", "imf", "flow_matching"] = "meanflow"
    ratio: float | None = None  # meanflow, imf: share of samples with r != t; None: 0.25 for meanflow, 0.5 for imf
    omega: float = 1.0  # meanflow: weight of the data's velocity in the guided target; scale is omega / (1 - kappa)
    kappa: float = 0.0  # meanflow: weight of the network's own class-conditional velocity in the guided target
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # meanflow: times at which the target is guided
    cfg_beta: float = 1.0  # imf: guidance scales are drawn with density omega^-cfg_beta from 1 to omega_max
    omega_max: float = 8.0  # imf: largest guidance scale in training
    label_dropout: float = 0.1  # share of samples trained without their label
    norm_p: float | None = None  # power of the adaptive loss weight; None: 1 for meanflow and imf, 0 for flow_matching
    norm_eps: float = 0.01  # epsilon of the adaptive loss weight
    time_sampler: Literal["logit_normal", "uniform"] = "logit_normal"  # how times are drawn
    time_mean: float | None = None  # of logit(t); None: -0.4 for meanflow and imf, 0 for flow_matching
    time_std: float = 1.0  # of logit(t)

    # optimiser
    steps: int = 100_000  # optimiser steps
    batch_size: int = 256  # samples of one optimiser step, over all processes and accumulated parts
    accumulate: int = 1  # parts into which each process cuts its share of a batch, to save memory
    lr: float = 1e-4  # peak learning rate of AdamW
    warmup_steps: int = 0  # steps of linear warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up: stay, or fall to zero at the last step
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.0  # of AdamW
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema_decay: float = 0.9999  # of the averaged weights, min(this, (1 + step) / (10 + step)); 0: no averaging

    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: what accelerate finds, a CPU where there is no GPU
    threads: int = 0  # CPU threads of each process; 0: one per core. One is best for small networks
    strategy: Literal["ddp", "fsdp"] = "ddp"  # several processes: a copy of the network in each, or a piece (FSDP2)
    checkpoint_blocks: Literal["all"] | int = 0  # blocks recomputed in the backward instead of kept, from the first on
    compile: bool = False  # torch.compile of the whole objective, as one graph; under fsdp of each block
    compile_mode: Literal["default", "reduce-overhead"] = "default"  # reduce-overhead: with CUDA graphs, needs a GPU
    cuda_graphs: Literal["auto"] | bool = "auto"  # record the step as a CUDA graph; auto: on one GPU
    # auto: bf16 on a GPU that has it, else no. no: float32. tf32: its products on tensor cores. bf16, fp16: autocast.
    # bf16-weights: weights and optimiser too
    precision: Literal["auto", "no", "tf32", "bf16", "bf16-weights", "fp16"] = "auto"

    # run
    name: str = "default"  # the run folder is runs/NAME under the working directory
    seed: int = 0  # of weights, data order and every draw
    log_every: int = 20  # steps between lines of log.jsonl
    sample_every: int = 1000  # steps between sample grids; 0: at the end only
    checkpoint_every: int = 1000  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints that are kept; 1 needs room for two while one is written
    tensorboard: bool = False  # also log for TensorBoard, in the run folder
    sample_omega: float = 2.0  # imf: guidance scale of the report's images, and the default of `meanflow sample`
    sample_interval: tuple[float, float] = (0.0, 1.0)  # imf: the times that it guides
    evaluate: bool = True  # at the end, write report.json (accuracy and Frechet distance of generated images)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UsageError(f"{field.name}: expected a finite number, got {number}")
                if isinstance(number, int) and abs(number) >= 2**63:
                    raise UsageError(f"{field.name}: expected a number of less than 64 bits, got {shown(number)}")
        for name in (
            "image_size",
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("hidden_size", "depth", "num_heads", "patch_size", "aux_head_depth"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("workers", "threads", "warmup_steps", "weight_decay", "grad_clip", "sample_every", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                raise UsageError(f"{name}: expected at most {most}, got {getattr(self, name)}")
        if max(self.prefix_tokens or (0,)) > _MOST["hidden_size"]:
            raise UsageError(f"prefix_tokens: expected at most {_MOST['hidden_size']} each, got {self.prefix_tokens}")
        if self.seed >= 2**32:  # what NumPy takes
            raise UsageError(f"seed: expected less than 2**32, got {self.seed}")
        for name in ("held_out", "ema_decay", "beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UsageError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if not self.sample_omega >= 1.0:
            raise UsageError(f"sample_omega: expected a number >= 1, got {self.sample_omega}")
        if not 0.0 <= self.sample_interval[0] <= self.sample_interval[1] <= 1.0:
            raise UsageError(f"sample_interval: expected 0 <= low <= high <= 1, got {self.sample_interval}")
        if self.checkpoint_blocks != "all" and self.checkpoint_blocks < 0:
            raise UsageError(f"checkpoint_blocks: expected 'all' or at least 0, got {self.checkpoint_blocks}")
        for name in ("lr", "time_std"):
            if getattr(self, name) <= 0.0:
                raise UsageError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if self.batch_size % self.accumulate != 0:
            raise UsageError(
                f"batch_size: expected a multiple of accumulate = {self.accumulate}, got {self.batch_size}"
            )

    @property
    def guidance(self) -> dict[str, float]:
        """What an iMF-DiT is asked for when it samples; empty for networks whose guidance is built in."""
        if self.objective != "imf":
            return {}
        return {"omega": self.sample_omega, "t_min": self.sample_interval[0], "t_max": self.sample_interval[1]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
