"""What the processes of test_targets.py run: steps of objectives with an averaged copy of the network, or teachers."""

import os
import sys
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from minimum import COMPILES, SHARDS
from processes import run_cases
from target_objectives import METHODS, OBJECTIVES
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

from meanflow.config import Config
from meanflow.models import DiT
from meanflow.objectives import Networks
from meanflow.objectives.forms import EDM
from meanflow.training.ema import TargetEMA
from meanflow.training.networks import fixed
from meanflow.training.parallel import checkpoint_blocks, training_loss
from mfkernels.testing import relative_error

B, STEPS = 16, 3
COMPILE = torch.compile
# Relative errors against one process in float64, whatever the objective and the form; measured half of these and less.
EXACT = {"loss": 5e-16, "gradient": 1.5e-15, "weight": 5e-17, "average": 2e-16}
BF16 = {"loss": 4e-2, "gradient": 0.3, "weight": 1.2e-3, "average": 5e-4}  # after steps that amplify the roundings


def network(seed=1, dtype=torch.float64, depth=2):
    torch.manual_seed(seed)
    net = DiT(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=depth, num_heads=2, num_classes=3)
    net.to(dtype)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return net


def beside(name, dtype):
    """Networks of this objective, and what they are called with."""
    objective = (OBJECTIVES | METHODS)[name]
    if objective.target_decay(0) is not None:
        return {"ema": network(dtype=dtype)}
    sizes = {"frozen": (2, 3), "weak": (3, 1)}  # seed and depth
    return {role: network(seed, dtype, depth) for role, (seed, depth) in sizes.items() if role in objective.teachers}


def batch(name, step, dtype):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(B, 2, 4, 4, generator=generator).to(dtype)  # [B, C, H, W]
    y = torch.randint(3, (B,), generator=generator)  # [B]
    return x, y, (OBJECTIVES | METHODS)[name].draw(x.shape, step=step, generator=generator, dtype=dtype, spread=True)


def optimizer_of(net):
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def wrapped(nets):
    """The weak teacher in another form than the network."""
    return {name: EDM().wrap(net) if name == "weak" else net for name, net in nets.items()}


def reference(name, dtype):
    """One process's losses, gradients of the last step, weights and averages; the averages by their formula."""
    net, nets, objective = network(dtype=dtype), beside(name, dtype), (OBJECTIVES | METHODS)[name]
    optimizer, losses = optimizer_of(net), []
    for other in nets.values():
        other.requires_grad_(False)
    averages = {parameter: p.detach().clone() for parameter, p in net.named_parameters()}
    for step in range(STEPS):
        optimizer.zero_grad()
        if "ema" in nets:
            nets["ema"].load_state_dict({**net.state_dict(), **averages})
        loss = objective.loss(net, *batch(name, step, dtype), Networks(**wrapped(nets))).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        d = objective.target_decay(step)
        if d is not None:
            averages = {key: d * average + (1 - d) * net.state_dict()[key] for key, average in averages.items()}
    grads = {key: p.grad for key, p in net.named_parameters() if p.requires_grad}
    return losses, grads, dict(net.named_parameters()), averages


def whole(a):
    return a.full_tensor() if isinstance(a, DTensor) else a


def flat(tensors):
    return torch.cat([whole(a.detach()).flatten() for a in tensors])


def stepped(name, rank, world, *, strategy, precision="no", compiled=False, checkpointed=False):
    """Steps as the trainer makes them, of two parts each."""
    dtype = torch.float64 if precision == "no" else torch.float32
    config = Config.of(
        strategy=strategy, precision=precision, compile=compiled, checkpoint_blocks="all" if checkpointed else 0
    )
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    objective, net, nets = (OBJECTIVES | METHODS)[name], network(dtype=dtype), beside(name, dtype)
    before = {role: {key: value.clone() for key, value in other.state_dict().items()} for role, other in nets.items()}
    checkpoint_blocks(net, config.run.checkpoint_blocks)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with patch("torch.compile", lambda fn, **options: COMPILE(fn, backend=counter, **options)):
        for other in nets.values():
            fixed(other, config, accelerator)
        loss_of = training_loss(net, objective, config, accelerator, Networks(**wrapped(nets)))
    assert set(loss_of.parameters()) == set(net.parameters())
    if strategy == "fsdp":
        assert all(isinstance(p, DTensor) for other in nets.values() for p in other.parameters())
    average = TargetEMA(nets["ema"], objective.target_decay) if "ema" in nets else None
    optimizer, losses = optimizer_of(net), []
    for step in range(STEPS):
        optimizer.zero_grad()
        graphs = counter.frame_count
        x, y, draws = batch(name, step, dtype)
        parts = []
        for micro in range(2):
            i = micro * world + rank
            with accelerator.accumulate(loss_of):
                out = loss_of(x.chunk(2 * world)[i], y.chunk(2 * world)[i], draws.part(i, 2 * world))
                accelerator.backward(out.loss)
                parts.append(out.loss.detach())
        optimizer.step()
        if average is not None:
            average.update(net, step)
        mean = torch.stack(parts).mean()
        dist.all_reduce(mean)
        losses.append(mean / world)
        assert all(p.grad is None for other in nets.values() for p in other.parameters())
    if compiled:
        assert counter.frame_count == graphs  # of the steps before
        assert graphs == 1 or strategy == "fsdp"
    for role in () if average is not None else nets:
        assert all(torch.equal(whole(value), before[role][key]) for key, value in nets[role].state_dict().items())
    expected, grads, weights, averages = reference(name, dtype)
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    pairs = {
        "loss": ([torch.stack(losses)], [torch.stack(expected)]),
        "gradient": ([p.grad for p in trained.values()], [grads[key] for key in trained]),
        "weight": ([*trained.values()], [weights[key] for key in trained]),
    }
    if average is not None:
        pairs["average"] = ([*nets["ema"].parameters()], [averages[key] for key, _ in net.named_parameters()])
    for kind, (found, wanted) in pairs.items():
        error = relative_error(flat(found), flat(wanted))
        assert error <= (EXACT if precision == "no" else BF16)[kind], (kind, error)


FORMS = {
    "ddp": partial(stepped, strategy="ddp"),
    "ddp, checkpointed": partial(stepped, strategy="ddp", checkpointed=True),
    "ddp, bf16": partial(stepped, strategy="ddp", precision="bf16"),
    "fsdp": partial(stepped, strategy="fsdp"),
    "fsdp, checkpointed": partial(stepped, strategy="fsdp", checkpointed=True),
    "fsdp, bf16": partial(stepped, strategy="fsdp", precision="bf16"),
}
COMPILED = {
    "ddp, compiled": partial(stepped, strategy="ddp", compiled=True),
    "fsdp, compiled": partial(stepped, strategy="fsdp", compiled=True),
}


def cases(world):
    forms = FORMS | (COMPILED if COMPILES else {})
    return {
        f"{name}: {form}": partial(case, name)
        for form, case in forms.items()
        if SHARDS or "fsdp" not in form
        for name in (OBJECTIVES | METHODS if form in ("ddp", "fsdp") else OBJECTIVES)
    }


if __name__ == "__main__":
    # accelerate asks for these also where a process group exists
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": sys.argv[2]}
    os.environ |= {"LOCAL_WORLD_SIZE": sys.argv[2], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run_cases(cases, seconds=180)
