"""diffusers' DiTTransformer2DModel, untouched, trained with MeanFlow on the digits; t - r is one more channel."""

import sys

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from meanflow import sample
from meanflow.data import load_digits_data
from meanflow.objectives import MeanFlow
from mfkernels import dualize


class Velocity(nn.Module):
    num_classes = 10  # the index that diffusers' label table keeps for "no label", too

    def __init__(self):
        super().__init__()
        sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "sample_size": 8, "patch_size": 2}
        self.dit = DiTTransformer2DModel(in_channels=2, out_channels=1, num_embeds_ada_norm=10, **sizes)

    def forward(self, z, r, t, y):  # z (B, 1, 8, 8); r, t, y (B,)
        interval = (t - r).view(-1, 1, 1, 1).expand_as(z)  # [B, 1, 8, 8]
        return self.dit(torch.cat([z, interval], dim=1), timestep=1000 * t, class_labels=y, return_dict=False)[0]


data, net = load_digits_data(0.0).train, dualize(Velocity(), report=True)
objective = MeanFlow(ratio=0.25, label_dropout=0.0)  # the model drops labels itself
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 300):
    pick = torch.randint(len(data), (64,))
    loss = objective(net, data.images(pick), data.labels[pick]).loss
    optimizer.zero_grad(), loss.backward(), optimizer.step()
print(f"loss {loss.item():.3f}", sample(net.eval(), torch.randn(4, 1, 8, 8), torch.arange(4)).shape, net.dual_report)
