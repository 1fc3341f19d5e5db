"""Largest singular value of ∂u/∂z along trajectories of 2-D networks, with and without the bound on their linears.

    python bench/points/lipschitz.py [--steps 1200] [--shape moons]

Trains the recipe "points" twice in a temporary folder, and draws 500 points in 16 steps of the average velocity: at
each (z, r, t) of a trajectory the norm of ∂u/∂z is measured, and beside it the product that bounds it (see `MLP`).

Moons, 400 steps, seed 0: at most 3.09 on the paths (product 42.6) without the bound, 1.09 (4.5) with it; Fréchet
distance 0.003 and 0.039.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from meanflow.evaluation import PointStatistics
from meanflow.recipes import recipe
from meanflow.training import load_network, run_training
from meanflow.training.report import evaluate_network


@torch.no_grad()
def norms(net: nn.Module, r: float, t: float, z: Tensor, y: Tensor) -> Tensor:
    """(B,) largest singular values of ∂u/∂z: two forward-mode passes, as points are 2-D."""
    times = [torch.full((len(z),), time) for time in (r, t)]
    columns = []
    for axis in range(2):
        v = torch.zeros_like(z)
        v[:, axis] = 1.0
        columns.append(torch.func.jvp(lambda a: net(a, *times, y), (z,), (v,))[1].flatten(1))  # [B, 2]
    return torch.linalg.matrix_norm(torch.stack(columns, dim=2), 2)  # [B]


@torch.no_grad()
def bound(net: nn.Module) -> float:
    """The product of `MLP`'s docstring."""
    product = torch.linalg.matrix_norm(net.x_proj.weight, 2) * torch.linalg.matrix_norm(net.final_layer.weight, 2)
    for block in net.blocks:
        product = product * (1.0 + 1.1 * torch.linalg.matrix_norm(block.linear.weight, 2))
    return float(product)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=recipe("points").optim.steps)
    parser.add_argument("--shape", default="moons")
    options = parser.parse_args()
    print(
        f"{'':>14} {'max on path':>12} {'mean':>6} {'one step max':>13} {'bound':>10}  accuracy  Fréchet   energy"
        "  training s"
    )
    for bounded in (False, True):
        config = recipe("points").replace(
            steps=options.steps, shape=options.shape, spectral_norm=bounded, sample_every=0, evaluate=False
        )
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            with torch.enable_grad():
                result = run_training(config)
            loaded = load_network(Path("runs/points"))
        y = torch.arange(500) % len(loaded.class_names)
        z = torch.randn(500, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        once = norms(loaded.net, 0.0, 1.0, z, y)
        found = []
        for step in range(16, 0, -1):
            t, r = step / 16, (step - 1) / 16
            found.append(norms(loaded.net, r, t, z, y))
            u = loaded.net(z, torch.full((500,), r), torch.full((500,), t), y)
            z = z - (t - r) * u
        path = torch.stack(found)  # [16, B]
        figures = evaluate_network(loaded, config.data.load(), PointStatistics())
        print(
            f"{'spectral_norm' if bounded else 'free':>14} {path.max():>12.2f} {path.mean():>6.2f} {once.max():>13.2f} "
            f"{bound(loaded.net):>10.1f} {figures['class_accuracy']:>9.3f} {figures['frechet_distance']:>8.4f} "
            f"{figures['energy_distance']:>8.4f} {result.seconds:>11.0f}"
        )


if __name__ == "__main__":
    main()
