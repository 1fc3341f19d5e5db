"""What the processes of test_wrappers.py run; every assertion is made in the processes themselves."""

import os
import sys
import traceback
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from meanflow.models import DiT
from meanflow.objectives import MeanFlow
from mfkernels import checkpoint_module
from mfkernels.testing import relative_error

SIZE = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
}
OBJECTIVE = MeanFlow(ratio=0.5, omega=0.8, kappa=0.5, label_dropout=0.3, norm_p=0.5)
B = 16
EXACT = (1e-15, 1.2e-14)  # loss and gradients; measured 1.9e-16 and 5.8e-15, with four processes
BF16_BOUNDS = (5e-3, 6e-2)  # against float32; measured 2.2e-3 and 2.7e-2


def network(dtype):
    torch.manual_seed(1)
    net = DiT(**SIZE).to(dtype)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return net


def batch(dtype):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(B, 2, 4, 4, generator=generator).to(dtype)  # [B, C, H, W]
    y = torch.randint(3, (B,), generator=generator)  # [B]
    return x, y, OBJECTIVE.draw(x.shape, generator=generator, dtype=dtype, spread=True)


def step(net, micro, micros, rank, world, dtype):
    """Forward and backward of one micro-batch of this process; its loss."""
    x, y, draws = batch(dtype)
    i, parts = micro * world + rank, micros * world
    out = OBJECTIVE.loss_of(net, x.chunk(parts)[i], y.chunk(parts)[i], draws.part(i, parts))
    (out.loss / micros).backward()
    return out.loss.detach()


def reference(dtype):
    net = network(dtype)
    out = OBJECTIVE.loss_of(net, *batch(dtype))
    out.loss.backward()
    return out.loss.detach(), {n: p.grad for n, p in net.named_parameters() if p.requires_grad}


def whole(grad):
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def check(net, losses, dtype, loss_bound, grad_bound):
    expected, grads = reference(dtype)
    mean = torch.stack(losses).mean().double()
    dist.all_reduce(mean)
    assert relative_error(mean / dist.get_world_size(), expected) <= loss_bound
    for name, p in net.named_parameters():
        if p.requires_grad:
            error = relative_error(whole(p.grad), grads[name.removeprefix("module.")])
            assert error <= grad_bound, (name, error)


def ddp(rank, world, *, static_graph=False, micros=1, checkpointed=False):
    net = network(torch.float64)
    if checkpointed:
        for block in net.blocks:
            checkpoint_module(block)
    net = DistributedDataParallel(net, static_graph=static_graph)
    for _ in range(2):  # a static graph is recorded in the first step and relied upon in the second
        net.zero_grad()
        losses = []
        for micro in range(micros):
            with net.no_sync() if micro < micros - 1 else nullcontext():
                losses.append(step(net, micro, micros, rank, world, torch.float64))
        check(net, losses, torch.float64, *EXACT)


def fsdp(rank, world, *, micros=1, checkpointed=False, bf16=False):
    dtype = torch.float32 if bf16 else torch.float64
    net = network(dtype)
    mesh = init_device_mesh("cpu", (world,))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if checkpointed:
        for block in net.blocks:
            checkpoint_module(block)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    for _ in range(2):
        net.zero_grad()
        losses = []
        for micro in range(micros):
            net.set_requires_gradient_sync(micro == micros - 1)
            losses.append(step(net, micro, micros, rank, world, dtype))
        check(net, losses, dtype, *(BF16_BOUNDS if bf16 else EXACT))


CASES = {
    "ddp": ddp,
    "ddp, static_graph": partial(ddp, static_graph=True),
    "ddp, checkpointed": partial(ddp, checkpointed=True),
    "ddp, no_sync": partial(ddp, micros=2),
    "fsdp": fsdp,
    "fsdp, accumulated": partial(fsdp, micros=2),
    "fsdp, checkpointed": partial(fsdp, checkpointed=True),
    "fsdp, bf16": partial(fsdp, bf16=True),
    "fsdp, bf16, checkpointed": partial(fsdp, bf16=True, checkpointed=True),
}


def run(rank, world, folder):
    """One process: every case in turn, so that the start-up is paid once. Writes {case: "" or a traceback}."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    told = {}
    for name, case in CASES.items():
        try:
            case(rank, world)
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
            break  # the other processes may be waiting elsewhere by now
    torch.save(told, f"{folder}/told.{rank}")


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # gloo's threads, torn down with the interpreter, abort now and then: all has been told by now
