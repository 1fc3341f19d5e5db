"""A training step of every method (forward, loss, backward) as a multiple of flow matching's, with its own defaults.

DiT of width 384, depth 6, 6 heads, 64 tokens, batch 32, float32. Each is timed in turns with flow matching on the same
network; beside the time stand the products that it makes, counted, which is what it could cost. Loss and gradients are
compared with the same method's in float64 first, and one that disagrees is not timed.

    python -m pytest bench/step/test_methods.py --json FILE
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from measure import REHEARSAL
from torch import nn

from meanflow import registry
from meanflow.models import DiT, IMFDiT
from meanflow.objectives import Networks
from mfkernels.measuring import flops_of, interleaved_seconds, peak_bytes
from mfkernels.testing import relative_error

SIZE = {"input_size": 16, "patch_size": 2, "in_channels": 4, "num_classes": 10}
SIZE |= {"hidden_size": 16, "num_heads": 1} if REHEARSAL else {"hidden_size": 384, "num_heads": 6}
DEPTH = 1 if REHEARSAL else 6
BATCH = 8 if REHEARSAL else 32
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
BASE = "flow_matching"
# of a run that is past its curricula's beginnings
STEP = 100_000
NAMES = [name for name in registry.names("objectives") if name != "tarflow"]  # it has a network of its own


class Step:
    """Loss and gradients of a method's step."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, batch: int) -> None:
        self.objective = registry.find("objectives", name)()
        self.net = self.network(dtype).to(device)
        frozen = {role: self.copy() for role in self.objective.teachers}
        ema = self.copy() if self.objective.target_decay(STEP) is not None else None
        learned = self.objective.learned_module()
        self.nets = Networks(
            ema=ema, learned=None if learned is None else learned.to(device=device, dtype=dtype), **frozen
        )
        generator = torch.Generator().manual_seed(2)
        shape = (batch, SIZE["in_channels"], SIZE["input_size"], SIZE["input_size"])
        self.x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)  # [B, C, H, W]
        self.y = torch.randint(SIZE["num_classes"], (batch,), generator=generator).to(device)  # [B]
        draws = self.objective.draw(shape, step=STEP, generator=generator, spread=True)
        self.draws = draws.map(lambda a: a.to(device, dtype) if a.is_floating_point() else a.to(device))

    def network(self, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        two = self.objective.outputs == ("u", "v")
        net = IMFDiT(depth=max(2, DEPTH), aux_head_depth=1, **SIZE) if two else DiT(depth=DEPTH, **SIZE)
        for p in net.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.03)  # nothing hides behind adaLN-Zero's zeros
        return net.to(dtype)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.net).requires_grad_(False)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.net.zero_grad(set_to_none=True)
        loss = self.objective.loss(self.net, self.x, self.y, self.draws, self.nets).loss
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", [BASE, *(name for name in NAMES if name != BASE)])
def test_method(name, device, figures):
    few = max(8, registry.find("objectives", name)().group_size)
    for got, wanted in zip(
        Step(name, device, torch.float32, few)(), Step(name, device, torch.float64, few)(), strict=True
    ):
        error = relative_error(got, wanted)
        assert error < 1e-3, f"{name} is wrong by {error:.1e}, so it is not timed"
    step, base = Step(name, device, torch.float32, BATCH), Step(BASE, device, torch.float32, BATCH)
    times = interleaved_seconds({"way": step, "base": base}, rounds=ROUNDS)
    figures.append(
        {
            "table": f"A step of each method, DiT {SIZE['hidden_size']}×{DEPTH}, 64 tokens, batch {BATCH}, float32",
            "method": name,
            "ms": 1e3 * min(times["way"]),
            # of the least times: on a machine that others disturb they agree from run to run, medians do not
            "× flow matching": min(times["way"]) / min(times["base"]),
            "× its FLOPs": flops_of(step) / flops_of(base),
            "× its memory": peak_bytes(step) / peak_bytes(base),
        }
    )
