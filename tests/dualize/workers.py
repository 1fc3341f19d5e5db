"""What the processes of test_wrappers.py run; every assertion is made in the processes themselves."""

from functools import partial

import torch
from foreign import SiT
from minimum import SHARDS
from processes import run_cases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mfkernels
from mfkernels.testing import relative_error

B = 8


class Checkpointed(SiT):
    def run(self, block, x, c):
        return checkpoint(block, x, c, use_reentrant=False)


def network(kind=SiT, dtype=torch.float64):
    torch.manual_seed(1)
    return kind().to(dtype)


def inputs(rank, world, dtype):
    g = torch.Generator().manual_seed(5)
    z, v = torch.randn(2, B, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype)
    t = torch.rand(B, generator=g, dtype=torch.float64).to(dtype)
    # rows with tangents: the first of every process's part
    return [x.chunk(world)[rank] for x in (z, v, t)]


def step(net, z, v, t):
    u, du = mfkernels.jvp(net, (z, t), (v, torch.ones_like(t)), rows=1)
    loss = (u - torch.cat([v[:1] - 0.5 * du, v[1:]])).square().mean()
    loss.backward()
    return loss.detach()


def check(net, world, bound):
    plain = network()
    for rank in range(world):
        step(mfkernels.dualize(plain), *inputs(rank, world, torch.float64))
    for name, p in net.named_parameters():
        if p.requires_grad and p.grad is not None:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            expected = plain.get_parameter(name.removeprefix("module.")).grad / world
            if expected.norm() > 1e-12:
                assert relative_error(grad, expected) <= bound, (name, relative_error(grad, expected))


def ddp(rank, world, kind=SiT, **options):
    net = network(kind)
    net = DistributedDataParallel(mfkernels.dualize(net), **options)
    for _ in range(2):
        net.zero_grad()
        step(net, *inputs(rank, world, torch.float64))
    check(net, world, 1e-13)


def fsdp(rank, world, kind=SiT, dualize_first=True, bf16=False):
    dtype = torch.float32 if bf16 else torch.float64
    net = network(kind, dtype)
    if dualize_first:
        net = mfkernels.dualize(net)
    mesh = init_device_mesh("cpu", (world,))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    if not dualize_first:
        net = mfkernels.dualize(net)
    for _ in range(2):
        net.zero_grad()
        step(net, *inputs(rank, world, dtype))
    check(net, world, 0.1 if bf16 else 1e-13)


CASES = {
    "ddp": ddp,
    "ddp, static_graph": partial(ddp, static_graph=True),
    "ddp, checkpointed": partial(ddp, kind=Checkpointed),
    "fsdp": fsdp,
    "fsdp, dualized after": partial(fsdp, dualize_first=False),
    "fsdp, bf16": partial(fsdp, bf16=True),
    "fsdp, checkpointed": partial(fsdp, kind=Checkpointed),
}


if __name__ == "__main__":
    run_cases(lambda world: {name: c for name, c in CASES.items() if SHARDS or "fsdp" not in name}, seconds=120)
