"""A SiT as its repository writes it, from noise at time 0 to data at 1, trained with MeanFlow on the digits."""

import sys

import torch
from networks.sit import SiT, TimestepEmbedder
from torch import nn

from meanflow import sample
from meanflow.data import load_digits_data
from meanflow.objectives import MeanFlow
from mfkernels import dualize


class TwoTimes(nn.ModuleList):
    def forward(self, times):  # (B, 2)
        return self[0](times[:, 0]) + self[1](times[:, 1])


class Turned(nn.Module):  # SiT's time is 1 - t, so u = -v; it is also told t - r
    def __init__(self, sit):
        super().__init__()
        self.sit, self.num_classes = sit, sit.num_classes
        sit.t_embedder = TwoTimes([sit.t_embedder, TimestepEmbedder(sit.linear.in_features)])

    def forward(self, z, r, t, y):
        return -self.sit(z, torch.stack([1 - t, t - r], dim=1), y)


data, net, objective = load_digits_data(0.0).train, dualize(Turned(SiT())), MeanFlow(ratio=0.25)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 300):
    pick = torch.randint(len(data), (64,))
    loss = objective(net, data.images(pick), data.labels[pick]).loss
    optimizer.zero_grad(), loss.backward(), optimizer.step()
print(f"loss {loss.item():.3f}", sample(net.eval(), torch.randn(4, 1, 8, 8), torch.arange(4)).shape)
