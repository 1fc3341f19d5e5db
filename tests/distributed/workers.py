"""What the processes of test_wrappers.py run; every assertion is made in the processes themselves."""

import os
import sys
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from minimum import COMPILES, SHARDS
from processes import run_cases
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from meanflow.config import Config
from meanflow.models import DiT, IMFDiT
from meanflow.objectives import ImprovedMeanFlow, MeanFlow
from meanflow.training.parallel import checkpoint_blocks, training_loss, transformer_blocks
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
PREFIX = {"num_class_tokens": 1, "num_time_tokens": 2, "num_cfg_tokens": 1, "num_interval_tokens": 1}
NETS = {"DiT": partial(DiT, **SIZE), "iMF-DiT": partial(IMFDiT, **SIZE, **PREFIX, aux_head_depth=1)}
OBJECTIVES = {
    "DiT": MeanFlow(ratio=0.5, omega=0.8, kappa=0.5, label_dropout=0.3, norm_p=0.5),
    "iMF-DiT": ImprovedMeanFlow(ratio=0.5, label_dropout=0.3, norm_p=0.5),
}
B = 16
COMPILE = torch.compile
EXACT = (1e-15, 1.2e-14)  # loss and gradients; measured 1.9e-16 and 5.8e-15, with four processes
BF16_BOUNDS = (5e-3, 7e-2)  # against float32; measured 2.2e-3 and 3.5e-2
# Gradients of the trainer's two strategies under autocast: the same weights in a DiT, measured 1.6e-9, and biases to a
# rounding, 1.2e-3, which FSDP2 makes and autocast does not. An iMF-DiT's blocks have norm weights and scales besides,
# which FSDP2 rounds too, 4.2e-2.
BF16_SAME = {"DiT": {"weight": 4e-9, "bias": 2.4e-3}, "iMF-DiT": {"weight": 8e-2, "bias": 8e-2}}


def network(name, dtype):
    torch.manual_seed(1)
    net = NETS[name]().to(dtype)
    for parameter, p in net.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, mean=1.0 if "norm" in parameter or "_scale" in parameter else 0.0, std=0.2)
    return net


def batch(name, dtype):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(B, 2, 4, 4, generator=generator).to(dtype)  # [B, C, H, W]
    y = torch.randint(3, (B,), generator=generator)  # [B]
    return x, y, OBJECTIVES[name].draw(x.shape, generator=generator, dtype=dtype, spread=True)


def part(name, micro, micros, rank, world, dtype):
    """x, y and draws of one micro-batch of this process."""
    x, y, draws = batch(name, dtype)
    i, parts = micro * world + rank, micros * world
    return x.chunk(parts)[i], y.chunk(parts)[i], draws.part(i, parts)


def step(name, net, micro, micros, rank, world, dtype):
    """Forward and backward of one micro-batch of this process; its loss."""
    out = OBJECTIVES[name].evaluate(net, *part(name, micro, micros, rank, world, dtype))
    (out.loss / micros).backward()
    return out.loss.detach()


def reference(name, dtype):
    net = network(name, dtype)
    out = OBJECTIVES[name].evaluate(net, *batch(name, dtype))
    out.loss.backward()
    return out.loss.detach(), {n: p.grad for n, p in net.named_parameters() if p.requires_grad}


def whole(grad):
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def check(name, net, losses, dtype, loss_bound, grad_bound):
    expected, grads = reference(name, dtype)
    mean = torch.stack(losses).mean().double()
    dist.all_reduce(mean)
    assert relative_error(mean / dist.get_world_size(), expected) <= loss_bound
    for parameter, p in net.named_parameters():
        if p.requires_grad:
            error = relative_error(whole(p.grad), grads[parameter.removeprefix("module.")])
            assert error <= grad_bound, (parameter, error)


def ddp(name, rank, world, *, static_graph=False, micros=1, checkpointed=False):
    net = network(name, torch.float64)
    if checkpointed:
        checkpoint_blocks(net, "all")
    net = DistributedDataParallel(net, static_graph=static_graph)
    for _ in range(2):  # a static graph is recorded in the first step and relied upon in the second
        net.zero_grad()
        losses = []
        for micro in range(micros):
            with net.no_sync() if micro < micros - 1 else nullcontext():
                losses.append(step(name, net, micro, micros, rank, world, torch.float64))
        check(name, net, losses, torch.float64, *EXACT)


def fsdp(name, rank, world, *, micros=1, checkpointed=False, bf16=False):
    dtype = torch.float32 if bf16 else torch.float64
    net = network(name, dtype)
    mesh = init_device_mesh("cpu", (world,))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if checkpointed:
        checkpoint_blocks(net, "all")
    for block in transformer_blocks(net):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    for _ in range(2):
        net.zero_grad()
        losses = []
        for micro in range(micros):
            net.set_requires_gradient_sync(micro == micros - 1)
            losses.append(step(name, net, micro, micros, rank, world, dtype))
        check(name, net, losses, dtype, *(BF16_BOUNDS if bf16 else EXACT))


class Exchanges(TorchDispatchMode):
    """Lists the exchanges of gradients that are started in it."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "reduce" in str(func):
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def trained(name, rank, world, *, strategy, precision="no", compiled=False, checkpointed=False):
    """Two steps as the trainer makes them, `training_loss` of two parts each; the parameters, with their gradients.

    Gradients are exchanged once a step: in one bucket of this size, or by each group of FSDP2.
    """
    dtype = torch.float64 if precision == "no" else torch.float32
    config = Config.of(strategy=strategy, precision=precision, compile=compiled)
    AcceleratorState._reset_state()  # one precision a process, by its rules
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    net = network(name, dtype)
    if checkpointed:
        checkpoint_blocks(net, "all")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with patch("torch.compile", lambda fn, **options: COMPILE(fn, backend=counter, **options)):
        loss_of = training_loss(net, OBJECTIVES[name], config, accelerator)
    for _ in range(2):
        net.zero_grad()
        losses = []
        graphs = counter.frame_count
        for micro in range(2):
            exchanges = Exchanges()
            with accelerator.accumulate(loss_of), nullcontext() if compiled else exchanges:  # a mode stops the compiler
                out = loss_of(*part(name, micro, 2, rank, world, dtype))
                accelerator.backward(out.loss)
                losses.append(out.loss.detach())
            if not compiled:
                groups = 1 if strategy == "ddp" else len(transformer_blocks(net)) + 1
                assert len(exchanges.ops) == (groups if micro == 1 else 0), exchanges.ops
        check(name, net, losses, dtype, *(EXACT if precision == "no" else BF16_BOUNDS))
    assert counter.frame_count == graphs  # the second step compiles nothing
    assert (graphs > 0) == compiled
    if compiled and strategy == "ddp":
        assert graphs == 1
    return dict(net.named_parameters())


def sharded_as_ddp_in_bf16(name, rank, world):
    """Autocast rounds a block's weights before their products, FSDP2 before they travel: the same numbers in a DiT.

    Autocast leaves a bias's gradient in float32, where it was summed; FSDP2 has it in bfloat16.
    """
    copies, pieces = (trained(name, rank, world, strategy=way, precision="bf16") for way in ("ddp", "fsdp"))
    for parameter, p in copies.items():
        if p.requires_grad:
            error = relative_error(whole(pieces[parameter].grad), p.grad)
            kind = "bias" if parameter.endswith("bias") else "weight"
            assert error <= BF16_SAME[name][kind], (parameter, error)


FORMS = {
    "ddp": ddp,
    "ddp, static_graph": partial(ddp, static_graph=True),
    "ddp, checkpointed": partial(ddp, checkpointed=True),
    "ddp, no_sync": partial(ddp, micros=2),
    "fsdp": fsdp,
    "fsdp, accumulated": partial(fsdp, micros=2),
    "fsdp, checkpointed": partial(fsdp, checkpointed=True),
    "fsdp, bf16": partial(fsdp, bf16=True),
    "fsdp, bf16, checkpointed": partial(fsdp, bf16=True, checkpointed=True),
    "the trainer's ddp": partial(trained, strategy="ddp"),
    "the trainer's fsdp": partial(trained, strategy="fsdp"),
    "the trainer's fsdp, bf16": sharded_as_ddp_in_bf16,
}
CASES = {f"{name}: {form}": partial(case, name) for name in NETS for form, case in FORMS.items()}
COMPILED = {  # seconds each
    "DiT: ddp, compiled": partial(trained, "DiT", strategy="ddp", compiled=True),
    "DiT: fsdp, compiled, checkpointed": partial(trained, "DiT", strategy="fsdp", compiled=True, checkpointed=True),
    "iMF-DiT: fsdp, compiled": partial(trained, "iMF-DiT", strategy="fsdp", compiled=True),
}


def cases(world):
    served = {name: case for name, case in CASES.items() if SHARDS or "fsdp" not in name}
    return served | COMPILED if world == 2 and COMPILES else served


if __name__ == "__main__":
    # accelerate asks for these also where a process group exists
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": sys.argv[2]}
    os.environ |= {"LOCAL_WORLD_SIZE": sys.argv[2], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run_cases(cases, seconds=180)
