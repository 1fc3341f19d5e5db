"""The `accelerate` object of a run: its device, precision and processes."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState

from ..checks import check_device
from ..config import Config
from ..errors import UsageError
from ..processes import world_size
from .folder import RunFolder
from .graphs import is_recorded
from .parallel import AUTOCAST, is_sharded, settled
from .trackers import trackers_of


def make_accelerator(config: Config, folder: RunFolder) -> Accelerator:
    """Device, precision and gradient accumulation as the configuration says.

    Raises:
        UsageError: this machine or installation cannot do that.
    """
    check_device(config.run.device)
    trackers_of(config.run)  # raises where one is not there
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UsageError(
                f"strategy: accelerate was told to use {name} by its own configuration; take that out, and choose with "
                "--strategy ddp or --strategy fsdp"
            )
    world_size()  # raises before accelerate would wait for processes that are not there
    # where PyTorch sees no GPU, accelerate starts no group by itself: each process would be a run of its own
    cpu = config.run.device == "cpu" or not torch.accelerator.is_available()
    device = PartialState(cpu=cpu).device
    config = settled(config, device)
    if config.run.precision in ("tf32", "fp16") and device.type != "cuda":  # accelerate would train in float32
        raise UsageError(
            f"precision: {config.run.precision} is a format of NVIDIA GPUs, and this run's device is {device}"
        )
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.run.precision if config.run.precision in AUTOCAST else "no",
            gradient_accumulation_steps=config.optim.accumulate,
            project_dir=str(folder.path),
        )
    except ValueError as error:  # a second run of this process with another precision
        raise UsageError(f"precision: {config.run.precision} cannot be used here: {error}") from error
    if accelerator.num_processes != world_size():  # which accelerate sets for mpirun's processes
        raise UsageError(
            f"WORLD_SIZE: {world_size()} processes are announced, and accelerate found {accelerator.num_processes} on "
            f"{device}; expected as many (`meanflow info` shows what PyTorch sees)"
        )
    torch_version = tuple(map(int, torch.__version__.split(".")[:2]))
    if is_sharded(config, accelerator) and accelerator.device.type == "cpu" and torch_version < (2, 7):
        raise UsageError(f"strategy: fsdp on a CPU: expected torch 2.7 or newer, found {torch.__version__}")
    if config.run.compile and torch_version < (2, 11):
        # older ones (2.6, 2.8 and 2.9 were tried) do not follow a Dual's properties
        raise UsageError(f"compile: expected torch 2.11 or newer, found {torch.__version__}")
    if config.run.compile and config.run.compile_mode == "reduce-overhead" and accelerator.device.type != "cuda":
        raise UsageError(
            f"compile_mode: reduce-overhead records CUDA graphs, and this run's device is {accelerator.device}; there "
            "expected default"
        )
    if config.run.compile and config.run.compile_mode == "reduce-overhead" and config.optim.accumulate > 1:
        # the gradients of one part are memory of its CUDA graph, which the next part's run takes (pytorch#169545)
        raise UsageError(f"accumulate: expected 1 with compile_mode reduce-overhead, got {config.optim.accumulate}")
    parts = config.optim.accumulate * accelerator.num_processes
    if config.optim.batch_size % parts != 0:
        raise UsageError(
            f"batch_size: expected a multiple of {parts} ({accelerator.num_processes} processes × accumulate = "
            f"{config.optim.accumulate}), got {config.optim.batch_size}"
        )
    is_recorded(config, accelerator)  # raises where it is asked for and cannot be
    return accelerator
