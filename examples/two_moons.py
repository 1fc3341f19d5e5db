"""MeanFlow of an ordinary MLP on 2-D data: samples in one step; average against instantaneous velocity, plotted."""

import math
import sys

import matplotlib.pyplot as plt
import torch
from torch import nn

from meanflow import sample
from meanflow.objectives import MeanFlow, Uniform
from mfkernels import dualize


class MLP(nn.Sequential):
    def forward(self, z, r, t, y):  # z (B, 2); r, t (B,); the labels are not used
        return super().forward(torch.cat([z, t[:, None], (t - r)[:, None]], dim=1))


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 6000
hidden = [layer for _ in range(3) for layer in (nn.Linear(192, 192), nn.SiLU())]
net, y = dualize(MLP(nn.Linear(4, 192), nn.SiLU(), *hidden, nn.Linear(192, 2))), torch.zeros(512, dtype=torch.long)
objective = MeanFlow(ratio=0.75, label_dropout=0.0, norm_p=0.75, norm_eps=1e-3, time_sampler=Uniform())
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(steps):
    angle, upper = math.pi * torch.rand(512), torch.randint(2, (512,)) * 2.0 - 1  # [B]
    x = torch.stack([angle.cos() - 0.5 * upper, upper * (angle.sin() - 0.25)], 1) * 1.5  # [B, 2]
    loss = objective(net, x + 0.05 * torch.randn(512, 2), y).loss
    optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
with torch.no_grad():
    z, one = torch.randn(2048, 2), torch.ones(2048)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 5))
    left.scatter(*sample(net, z, y.repeat(4), steps=1).T, s=2), left.set_title("one step")
    for r, name in ((0 * one, "average over [0, 1]"), (one, "instantaneous at t = 1")):
        right.quiver(*z[:80].T, *-net(z, r, one, y)[:80].T, color=f"C{int(r[0])}", label=name)
    right.legend(), fig.savefig("two_moons.png")
print(f"loss {loss.item():.3f}, two_moons.png")
