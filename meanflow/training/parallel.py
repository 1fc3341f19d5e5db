"""How the processes of a run hold the network: DDP keeps a copy in each, FSDP2 a shard of every tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mfkernels import TensorOrDual, checkpoint_module, linear_map
from mfkernels._torch import tree_map_only

from ..config import Config, Run
from ..errors import UsageError
from ..objectives import Draws, Loss, Networks, Objective

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLOCKS = "blocks are what its ModuleLists hold, or Sequentials of one class"


class TrainingLoss(nn.Module):
    """The objective of a network as one module: what DDP wraps, and what the compiler takes whole.

    Its parameters and its state are the network's and those of `nets.learned`. The other networks of `nets`, whose
    parameters are fixed in a step, are no submodules of it, so that nothing exchanges or steps them.
    """

    def __init__(self, net: nn.Module, objective: Objective, nets: Networks) -> None:
        super().__init__()
        self.net, self.objective, self.learned = net, objective, nets.learned
        self.nets = nets  # a tuple, in which nn.Module looks for no submodules

    def forward(self, x: Tensor, y: Tensor, draws: Draws) -> Loss:
        return self.objective.loss(self.net, x, y, draws, self.nets)


class ShardedLoss(TrainingLoss):
    """`TrainingLoss` of modules under FSDP2, with the `no_sync` that DDP has."""

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add up gradients in each process; the next one outside reduces the sum over all."""
        modules = [cast("FSDPModule", module) for module in (self.net, self.learned) if module is not None]
        for module in modules:
            module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True)


def settled(config: Config, device: torch.device) -> Config:
    """The configuration with its precision decided, where that is left to the device: see `Run.precision`."""
    if config.run.precision != "auto":
        return config
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, precision="bf16" if bf16 else "no"))


def check_parts(config: Config, processes: int) -> None:
    """Raise unless the batch can be cut into equal parts for the processes and what each of them accumulates."""
    batch, accumulate, objective = config.optim.batch_size, config.optim.accumulate, config.objective
    parts = accumulate * processes
    of = f"({processes} processes × accumulate = {accumulate})"
    rows = round(batch * objective.ratio)
    if objective.ratio > 0.0 and rows == 0:
        raise UsageError(
            f"ratio, batch_size: a share of {objective.ratio:g} of {batch} samples is none; expected one with r != t "
            "at least, or ratio 0"
        )
    if rows % parts != 0:
        raise UsageError(
            f"ratio, batch_size: {rows} of the batch's {batch} samples have r != t; expected a multiple of {parts} "
            f"{of}, so that each part has as many"
        )
    if batch % (parts * objective.group_size) != 0:
        raise UsageError(
            f"expected a multiple of {parts * objective.group_size}, {objective.group_size} samples belonging together "
            f"in each of {parts} parts {of}, got {batch}",
            field="batch_size",
        )


def is_sharded(config: Config, accelerator: Accelerator) -> bool:
    """Whether FSDP2 shards the network; with one process either strategy is none."""
    return config.run.strategy == "fsdp" and accelerator.num_processes > 1


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a network, in the order of their definition: those of its outermost lists of equal modules.

    Such a list is a ModuleList or, as in timm, a Sequential of one class, anywhere in the network.
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        alike = isinstance(child, nn.Sequential) and len(child) > 1 and len({type(part) for part in child}) == 1
        listed = isinstance(child, nn.ModuleList) or alike
        blocks += list(child.children()) if listed else transformer_blocks(child)
    return blocks


def checkpoint_blocks(model: nn.Module, count: int | str) -> None:
    """Recompute the first `count` transformer blocks of `model` (or "all") in the backward, primal alone.

    Raises:
        UsageError: it has fewer.
    """
    blocks = transformer_blocks(model)
    if count == "all" and not blocks:
        raise UsageError(f"checkpoint_blocks: {type(model).__name__} has no blocks ({BLOCKS}); expected 0, got 'all'")
    if count != "all" and int(count) > len(blocks):
        raise UsageError(
            f"checkpoint_blocks: expected 'all' or a number up to {len(blocks)} (blocks of the model), got {count}"
        )
    for block in blocks if count == "all" else blocks[: int(count)]:
        checkpoint_module(block)


def in_bfloat16(model: nn.Module) -> None:
    """Keep and compute `model` in bfloat16. Its image goes in rounded, its times as they are; float32 comes out."""
    forward = model.to(torch.bfloat16).forward

    def rounded(z: TensorOrDual, *args: Any, **kwargs: Any) -> Any:
        out = forward(linear_map(lambda a: a.to(torch.bfloat16), z), *args, **kwargs)
        return tree_map_only(Tensor, lambda a: a.float(), out)

    model.forward = rounded


def training_loss(
    model: nn.Module,
    objective: Objective,
    config: Config,
    accelerator: Accelerator,
    nets: Networks | None = None,
) -> nn.Module:
    """(x, y, draws) -> Loss over all processes, `model` on its device and in the run's precision.

    `nets` are the networks beside it. `nets.learned` is put on the device and stays in float32; the others are there
    already, see `place_network`.

    DDP wraps the whole objective, so that it exchanges gradients once a step whatever the objective evaluates.

    `compile` makes one graph of the whole objective; under FSDP2, whose gathering is no part of a graph, one of each
    block.
    """
    nets = Networks() if nets is None else nets
    place_network(model, config, accelerator)
    if is_sharded(config, accelerator):
        from torch.distributed.fsdp import fully_shard

        if nets.learned is not None:
            _check_cut(nets.learned)
            fully_shard(nets.learned, mesh=_mesh(accelerator))
        return ShardedLoss(model, objective, nets)
    if nets.learned is not None:
        nets.learned.to(accelerator.device)
    loss = TrainingLoss(model, objective, nets)
    if config.run.compile:
        compile_forward(loss, config.run)
    if accelerator.num_processes == 1:
        return loss
    device = accelerator.device
    return DistributedDataParallel(loss, device_ids=None if device.type == "cpu" else [device.index])


def place_network(model: nn.Module, config: Config, accelerator: Accelerator) -> None:
    """Put a network on the run's device and in its precision, in place; under FSDP2 each process keeps its shard.

    FSDP2 gathers each block as it is needed: where autocast rounds a block's weights for its matrix products anyway,
    they are rounded before they travel, and gradients are summed in float32. What is outside of the blocks travels in
    float32.
    """
    sharded = is_sharded(config, accelerator)
    # evaluation_mode: autocast inside, no wrapper. FSDP2 moves the shards to the device itself
    accelerator.prepare_model(model, device_placement=not sharded, evaluation_mode=True)
    if not sharded:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _check_cut(model)
    blocks = transformer_blocks(model)
    if config.run.compile and not blocks:
        raise UsageError(f"compile: under fsdp it compiles blocks, and {type(model).__name__} has none: {BLOCKS}")
    for block in blocks:
        if config.run.compile:
            compile_forward(block, config.run)
    mesh = _mesh(accelerator)
    half = AUTOCAST.get(config.run.precision)
    wide = None if config.run.precision in ("no", "tf32") else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=wide, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    policy = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)
    if any(p.requires_grad for p in model.parameters()):
        fully_shard(model, mesh=mesh, mp_policy=policy)
    else:  # no backward of its own gives up what the forward gathered
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def _check_cut(module: nn.Module) -> None:
    """Raise where FSDP2 cannot shard a parameter."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise UsageError(
                f"strategy: fsdp cuts parameters along their first dimension, and {name} is a single number; make it "
                "of shape (1,)"
            )


def reshard(module: nn.Module) -> None:
    """Give up what FSDP2 gathered of a network; up to torch 2.7 its outermost group is kept after a forward."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def compile_forward(module: nn.Module, run: Run) -> None:
    """Compile what `module` computes, as one graph; wrappers around it and hooks on it stay outside."""
    module.forward = torch.compile(module.forward, fullgraph=True, mode=run.compile_mode)


def is_distributed(value: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is sharded over the processes."""
    if type(value) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # takes a second

    return isinstance(value, DTensor)


def full_tensor(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded over the processes; every process takes part."""
    return value.full_tensor() if is_distributed(value) else value


def local_shard(value: Tensor) -> Tensor:
    """This process's shard of a tensor that may be sharded, in the same memory."""
    return value.to_local() if is_distributed(value) else value


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded over the processes as `like` is; every process takes part."""
    if not is_distributed(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
