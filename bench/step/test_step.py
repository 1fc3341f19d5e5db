"""A MeanFlow training step (forward and backward) next to a flow-matching step and to what people do today.

DiT of width 384, depth 6, 6 heads, 64 tokens, batch 32; 25 % of the rows have r ≠ t. Every figure is a multiple of the
flow-matching step of a plain PyTorch DiT through SDPA, eager and compiled, timed in turns in the same process. A way
whose loss and gradients do not agree with the float64 oracle is not timed.
"""

from __future__ import annotations

import os
from functools import partial

import peers
import pytest
import torch
from measure import torch_compile

import mfkernels
from meanflow.models import DiT
from mfkernels.measuring import interleaved_seconds, peak_bytes
from mfkernels.testing import relative_error

SIZE = {
    "input_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 384,
    "depth": 6,
    "num_heads": 6,
    "num_classes": 10,
}
BATCH, ROWS = 32, 8
PLAIN, COMPILED = "flow matching, plain DiT through SDPA", "flow matching, plain DiT through SDPA, compiled"
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "8"))


def ours(net, z, v, r, t, y, rows):
    """`mfkernels.jvp` of `meanflow.models.DiT`: one dual-number pass, tangents on `rows` rows."""
    u, du = mfkernels.jvp(net, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)), rows=rows, y=y)
    loss = mfkernels.adaptive_squared_error(u, v, du, t - r, p=0.0)
    return loss.per_sample.mean()


def draws(device, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, BATCH, 4, 16, 16, generator=g, dtype=torch.float64)
    t = 0.5 + 0.5 * torch.rand(BATCH, generator=g, dtype=torch.float64)
    r = t.clone()
    r[:ROWS] *= 0.3
    y = torch.randint(0, 10, (BATCH,), generator=g)
    return *(a.to(device, dtype) for a in (z, v, r, t)), y.to(device)


@pytest.fixture(scope="module")
def nets(device):
    torch.manual_seed(0)
    net = DiT(**SIZE)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.03)  # nothing hides behind adaLN-Zero's zeros
    plain, math = peers.PlainDiT(**SIZE), peers.PlainDiT(**SIZE)
    plain.load_state_dict(net.state_dict())
    math.load_state_dict(net.state_dict())
    math.attend = peers.math_attention
    return net.to(device), plain.to(device), math.to(device)


def loss_and_gradients(way, net, args):
    net.zero_grad(set_to_none=True)
    loss = way(net, *args)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])


def test_step(nets, device, figures, benchmark):
    net, plain, math = nets
    *inputs, y = draws(device)
    args = (*inputs, y, ROWS)
    every_row = (*inputs, y, BATCH)

    # a graph of its own for each: one that has seen two networks has guards for both
    compiled_plain, compiled_net, compiled_ours, compiled_jvp = (
        torch_compile(way, fullgraph=True) for way in (peers.flow_matching, peers.flow_matching, ours, peers.func_jvp)
    )
    ways = {
        PLAIN: (peers.flow_matching, plain, args),
        COMPILED: (compiled_plain, plain, args),
        "flow matching, this library's DiT": (peers.flow_matching, net, args),
        "flow matching, this library's DiT, compiled": (compiled_net, net, args),
        "MeanFlow, this library (25 % of rows)": (ours, net, args),
        "MeanFlow, this library (25 %), compiled": (compiled_ours, net, args),
        "MeanFlow, this library (every row)": (ours, net, every_row),
        "dual pass written by hand (25 %)": (peers.handwritten_dual, plain, args),
        "primal + no_grad torch.func.jvp (25 %)": (peers.primal_then_jvp, plain, args),
        "torch.compile of torch.func.jvp": (compiled_jvp, math, args),
        "primal + no_grad torch.func.jvp": (peers.primal_then_jvp, plain, every_row),
        "torch.func.jvp with its graph": (peers.func_jvp, math, args),
    }

    oracle = peers.PlainDiT(**SIZE).double().to(device)
    oracle.load_state_dict(net.state_dict())
    oracle.attend = peers.math_attention
    *inputs64, _ = draws(device, torch.float64)
    wanted = {
        way: loss_and_gradients(way, oracle, (*inputs64, y, ROWS)) for way in (peers.flow_matching, peers.func_jvp)
    }
    for name, (way, module, a) in ways.items():
        oracle_way = peers.flow_matching if name.startswith("flow matching") else peers.func_jvp
        for got, ref in zip(loss_and_gradients(way, module, a), wanted[oracle_way], strict=True):
            assert relative_error(got, ref) < 1e-5, f"{name} is wrong, so it is not timed"

    steps = {name: partial(loss_and_gradients, way, module, a) for name, (way, module, a) in ways.items()}
    times = interleaved_seconds(steps, rounds=ROUNDS)
    memory = {}
    for name, step in steps.items():
        for module in nets:
            module.zero_grad(set_to_none=True)  # the gradients are part of every step's peak
        memory[name] = peak_bytes(step)
    for name in ways:
        figures.append(
            {
                "table": "Training step, DiT 384×6, 64 tokens, batch 32, forward + backward, float32",
                "way": name,
                "ms": 1e3 * min(times[name]),
                # of the least times: on a machine that others disturb they agree from run to run, medians do not
                "× flow matching": min(times[name]) / min(times[PLAIN]),
                "× compiled": min(times[name]) / min(times[COMPILED]),
                "peak MB": memory[name] / 2**20,
                "× its memory": memory[name] / memory[PLAIN],
            }
        )
    benchmark.pedantic(steps["MeanFlow, this library (25 % of rows)"], rounds=1)
