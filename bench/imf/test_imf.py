"""An improved MeanFlow training step (forward and backward) next to the same objective as one writes it today.

iMF-DiT of width 256, 12 blocks to u of which 8 are its head, 84 tokens, batch 16; half of the rows have r ≠ t. Every
time is a multiple of one training forward with both heads of the plain network. A way whose loss and gradients do not
agree with the float64 oracle is not timed. FLOPs are counted, attention included, by `imf_peers.step_flops`.
"""

from __future__ import annotations

import os
from functools import partial

import imf_peers
import peers
import pytest
import torch
from measure import median_ratio

from meanflow.models import IMFDiT, IMFDiT_B_2
from meanflow.objectives import ImprovedMeanFlow
from mfkernels.measuring import interleaved_seconds, peak_bytes
from mfkernels.testing import relative_error

SIZE = {
    "input_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 256,
    "depth": 12,
    "num_heads": 4,
    "num_classes": 10,
    "aux_head_depth": 8,
    "num_class_tokens": 8,
    "num_time_tokens": 4,
    "num_cfg_tokens": 4,
    "num_interval_tokens": 2,
}
BATCH = 16
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "8"))


def draws(device, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, e = torch.randn(2, BATCH, 4, 16, 16, generator=g, dtype=torch.float64)
    t, share, omega, t_min, t_max = torch.rand(5, BATCH, generator=g, dtype=torch.float64)
    r = torch.where(torch.arange(BATCH) < BATCH // 2, t * share, t)
    floats = {"x": x, "noise": e, "t": t, "r": r, "omega": 1 + 7 * omega, "t_min": t_min / 2, "t_max": 0.5 + t_max / 2}
    d = {name: a.to(device, dtype) for name, a in floats.items()}
    d["y"] = torch.randint(0, 10, (BATCH,), generator=g).to(device)
    d["drop"] = (torch.arange(BATCH) % 8 == 3).to(device)
    return d


def ours(net, d):
    """`ImprovedMeanFlow` through `IMFDiT`: one dual-number pass, and no forward that need not be done."""
    return ImprovedMeanFlow().loss_at(net, **d).loss


def plain(net, d):
    """Every forward on every row, the derivative through `torch.func.jvp` with its graph."""
    return imf_peers.improved_meanflow(net, **d)[0].mean()


def loss_and_gradients(way, net, d):
    net.zero_grad(set_to_none=True)
    loss = way(net, d)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for _, p in sorted(net.named_parameters())])


def test_step(device, figures):
    torch.manual_seed(0)
    net = IMFDiT(**SIZE)
    for name, p in net.named_parameters():
        # nothing hides behind the zero-initialised branches
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.1 if "_scale" in name else 0.0, std=0.03)
    net = net.to(device)
    peer = imf_peers.PlainIMFDiT(**SIZE).to(device)
    peer.load_state_dict(net.state_dict())
    oracle = imf_peers.PlainIMFDiT(**SIZE).double().to(device)
    oracle.load_state_dict(net.state_dict())
    oracle.attend = peers.math_attention
    d = draws(device)
    wanted = loss_and_gradients(plain, oracle, draws(device, torch.float64))
    ways = {"improved MeanFlow, this library": (ours, net), "every forward on every row, torch.func.jvp": (plain, peer)}
    for name, (way, module) in ways.items():
        for got, ref in zip(loss_and_gradients(way, module, d), wanted, strict=True):
            assert relative_error(got, ref) < 1e-5, f"{name} is wrong, so it is not timed"

    forward = "one training forward, both heads"
    steps = {name: partial(loss_and_gradients, way, module, d) for name, (way, module) in ways.items()}
    steps[forward] = lambda: peer(d["x"], d["t"] - d["r"], d["omega"], d["t_min"], d["t_max"], d["y"])
    times = interleaved_seconds(steps, rounds=ROUNDS)
    memory = {}
    for name, step in steps.items():
        net.zero_grad(set_to_none=True)  # the gradients are part of every step's peak
        peer.zero_grad(set_to_none=True)
        memory[name] = peak_bytes(step)
    for name in steps:
        figures.append(
            {
                "table": "Improved MeanFlow step, iMF-DiT 256×12, 84 tokens, batch 16, forward + backward, float32",
                "way": name,
                "ms": 1e3 * min(times[name]),
                "× forward": median_ratio(times[name], times[forward]),
                "peak MB": memory[name] / 2**20,
            }
        )


@pytest.mark.parametrize("name", ["iMF-DiT 256×12, 84 tokens", "iMF-DiT-B/2, 276 tokens"])
def test_flops(figures, name):
    net = IMFDiT_B_2() if "B/2" in name else IMFDiT(**SIZE)
    step, forward = imf_peers.step_flops(net, ImprovedMeanFlow())
    figures.append(
        {
            "table": "FLOPs of an improved MeanFlow step, over one training forward with both heads (official: 5.4)",
            "network": name,
            "GFLOP a row": step / 2 / 1e9,
            "× forward": step / forward,
        }
    )
    assert step <= 4.4 * forward
