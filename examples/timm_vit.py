"""A ViT of timm's, untouched, as a velocity network on the digits: times are channels, its tokens are the velocity."""

import sys

import timm
import torch
import torch.nn.functional as F
from torch import nn

from meanflow import sample
from meanflow.data import load_digits_data
from meanflow.objectives import MeanFlow
from mfkernels import dualize


class Velocity(nn.Module):
    def __init__(self, patch=2, width=64):
        super().__init__()
        sizes = {"img_size": 8, "patch_size": patch, "embed_dim": width, "depth": 4, "num_heads": 4, "num_classes": 0}
        self.vit = timm.create_model("vit_tiny_patch16_224", in_chans=4, **sizes)
        self.labels, self.head = nn.Embedding(11, 8 * 8), nn.Linear(width, patch * patch)
        self.patch, self.num_classes = patch, 10

    def forward(self, z, r, t, y):  # z (B, 1, 8, 8); r, t, y (B,)
        times = torch.stack([t, t - r], dim=1)[:, :, None, None].expand(-1, -1, 8, 8)  # [B, 2, 8, 8]
        labels = self.labels(y).view(-1, 1, 8, 8)
        tokens = self.vit.forward_features(torch.cat([z, times, labels], dim=1))[:, self.vit.num_prefix_tokens :]
        return F.pixel_shuffle(self.head(tokens).mT.unflatten(2, (8 // self.patch, -1)), self.patch)


data, net, objective = load_digits_data(0.0).train, dualize(Velocity(), report=True), MeanFlow(ratio=0.25)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 300):
    pick = torch.randint(len(data), (64,))
    loss = objective(net, data.images(pick), data.labels[pick]).loss
    optimizer.zero_grad(), loss.backward(), optimizer.step()
print(f"loss {loss.item():.3f}", sample(net.eval(), torch.randn(4, 1, 8, 8), torch.arange(4)).shape, net.dual_report)
