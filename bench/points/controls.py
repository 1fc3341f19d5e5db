"""What each control does to an MLP on two moons: Lipschitz constant and monotony of its flow map, and the price.

    python bench/points/controls.py [--steps N] [--seeds N] [--only NAME…] [--json FILE]

Points are those of trajectories of eight steps from noise; there the Jacobian of u(z, r, t) is exact (torch.func).
"""

import argparse
import json
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from meanflow import sample
from meanflow.objectives import Control, FlowMatching, Hybrid, MeanFlow, Objective, Uniform
from mfkernels import dualize

COMMON = {"label_dropout": 0.0, "norm_p": 0.75, "norm_eps": 1e-3, "time_sampler": Uniform()}
METHODS: dict[str, Objective] = {
    "meanflow": MeanFlow(ratio=0.75, **COMMON),
    "meanflow, lipschitz 0.1": MeanFlow(ratio=0.75, control=Control(lipschitz=0.1), **COMMON),
    "meanflow, monotone 10": MeanFlow(ratio=0.75, control=Control(monotone=10.0, margin=0.3), **COMMON),
    "meanflow, bridge 0.5": MeanFlow(ratio=0.75, bridge=0.5, **COMMON),
    "hybrid": Hybrid(ratio=0.75, **COMMON),
    "flow_matching": FlowMatching(**COMMON),
    "flow_matching, lipschitz 0.1": FlowMatching(control=Control(lipschitz=0.1), **COMMON),
}
N, TIMES = 512, [i / 8 for i in range(8, -1, -1)]


class MLP(nn.Sequential):
    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:  # z (B, 2); r, t (B,)
        return super().forward(torch.cat([z, t[:, None], (t - r)[:, None]], dim=1))


def moons(n: int) -> Tensor:
    """(n, 2) points of two half circles."""
    angle, upper = math.pi * torch.rand(n), torch.randint(2, (n,)) * 2.0 - 1  # [n]
    x = torch.stack([angle.cos() - 0.5 * upper, upper * (angle.sin() - 0.25)], 1) * 1.5  # [n, 2]
    return x + 0.05 * torch.randn(n, 2)


def trained(objective: Objective, steps: int, seed: int) -> tuple[nn.Module, float]:
    """A network after its training, and the seconds that took."""
    torch.manual_seed(seed)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(96, 96), nn.SiLU())]
    net = dualize(MLP(nn.Linear(4, 96), nn.SiLU(), *hidden, nn.Linear(96, 2)))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    y, generator = torch.zeros(256, dtype=torch.long), torch.Generator().manual_seed(seed)
    begun = time.perf_counter()
    for _ in range(steps):
        loss = objective(net, moons(256), y, generator=generator).loss
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return net, time.perf_counter() - begun


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖ of (n, 2) and (m, 2) points, without bias."""
    n, m = len(a), len(b)
    own = torch.cdist(a, a).sum() / (n * (n - 1)) + torch.cdist(b, b).sum() / (m * (m - 1))
    return float(2 * torch.cdist(a, b).mean() - own)


def jacobians(net: nn.Module, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """∂u/∂z at each point, (n, 2, 2)."""

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return net(z[None], r[None], t[None], None)[0]

    return torch.vmap(torch.func.jacrev(u))(z, r, t).detach()


@torch.no_grad()
def measured(net: nn.Module, jumps: bool) -> dict[str, float]:
    """Lipschitz constants, monotony and quality; of the jump to r = 0 where the network learned it, else r = t."""
    torch.manual_seed(100)
    net, y = net.double(), torch.zeros(N, dtype=torch.long)
    z, points, times = torch.randn(N, 2, dtype=torch.float64), [], []
    for t, s in pairwise(TIMES):  # Euler steps of the instantaneous velocity
        t_ = torch.full((N,), t, dtype=torch.float64)
        points.append(z), times.append(t_)
        z = z - (t - s) * net(z, t_, t_, y)
    z, t = torch.cat(points), torch.cat(times)  # [8·N, 2], [8·N]
    r = torch.zeros_like(t) if jumps else t
    J = jacobians(net, z, r, t)  # [8·N, 2, 2]
    size = torch.linalg.matrix_norm(J, ord=2)  # [8·N], largest singular value
    found = {"lipschitz_mean": float(size.mean()), "lipschitz_max": float(size.max())}
    if jumps:
        dX = torch.eye(2, dtype=torch.float64) - t[:, None, None] * J  # [8·N, 2, 2], of X_{t→0}
        least = torch.linalg.eigvalsh((dX + dX.mT) / 2)[:, 0]  # [8·N]
        X = z - t[:, None] * net(z, r, t, y)
        pair = torch.cat([torch.randperm(N) + k * N for k in range(8)])  # of the same time
        inner = ((z - z[pair]) * (X - X[pair])).sum(1)  # [8·N]
        found |= {
            "not_monotone": float((least < 0).double().mean()),
            "turned_pairs": float((inner < 0).double().mean()),
        }
    noise, held_out = torch.randn(4096, 2, dtype=torch.float64), moons(4096).double()
    for steps in (1, 4, 32):
        images = sample(net, noise, torch.zeros(4096, dtype=torch.long), steps=steps)
        if not jumps:
            images = noise
            for i in range(steps, 0, -1):
                t = torch.full((4096,), i / steps, dtype=torch.float64)
                images = images - net(images, t, t, None) / steps
        found[f"energy_distance_{steps}"] = energy_distance(images, held_out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for name in options.only:
        runs = []
        for seed in range(options.seeds):
            net, seconds = trained(METHODS[name], options.steps, seed)
            runs.append({"seconds": seconds, **measured(net, not name.startswith("flow"))})
        results[name] = {key: [round(run[key], 5) for run in runs] for key in runs[0]}
        means = {key: sum(values) / len(values) for key, values in results[name].items()}
        print(f"{name:30}", *(f"{key} {value:.4g}" for key, value in means.items()), flush=True)
    if options.json:
        about = {"data": "two moons", "steps": options.steps, "batch": 256, "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
